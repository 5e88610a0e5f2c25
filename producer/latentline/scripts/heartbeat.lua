-- Record that a worker is alive, and tell it whether the broker still has its announcement.
--
-- Invariant: an announcement holds as long as its worker's heartbeat. One that was lost with the broker's data is not made up
-- for here: the worker announces again in full.
--
-- What the worker does now is a key of its own that soon expires, so that nothing has to clear up after lost workers.
--
-- Returns 1 when the announcement is there, else 0.
-- uses: clock, memory_bound

local worker, working, working_s = unpack(ARGV)

memory_bound.pass(keys.leases())
redis.call('ZADD', keys.workers(), clock.now, worker)
redis.call('SET', keys.working(worker), working, 'EX', working_s)
-- HGET and not HEXISTS, which rules of the broker's users from before do not allow to workers.
if not redis.call('HGET', keys.announced(), worker) then return 0 end
redis.call('ZADD', keys.announced_at(), clock.now, worker)
return 1
