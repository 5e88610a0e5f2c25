-- A worker that shuts down returns a job to the front of its queue.
--
-- Invariants:
-- * Only the holder of the newest token releases.
-- * A job whose cancellation was asked for is cancelled, not queued.
--
-- Returns 1, or 0 for a stale token.
-- uses: jobs, memory_bound

local id, token, retention_s = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'token', 'cancel_requested')
if job[1] ~= 'running' or job[2] ~= token then return 0 end
memory_bound.pass(keys.leases())
if job[3] == '1' then
  jobs.finish(id, 'cancelled', nil, retention_s)
else
  jobs.requeue(id, 0, true)
end
return 1
