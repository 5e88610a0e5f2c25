-- A worker that shuts down returns a job to the front of its queue.
--
-- Invariants:
-- * Only the holder of the newest token releases.
-- * A job whose cancellation was asked for is cancelled, not queued.
--
-- `account` is what the worker tells of this attempt, for the job's timeline; it may be empty.
--
-- Returns 1, or 0 for a stale token.
-- uses: jobs, memory_bound

local id, token, retention_s, account = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'token', 'cancel_requested')
if job[1] ~= 'running' or job[2] ~= token then return 0 end
memory_bound.pass(keys.leases())
if job[3] == '1' then
  jobs.finish(id, 'cancelled', nil, retention_s, account)
else
  jobs.requeue(id, 0, true, 'handed_over', account)
end
return 1
