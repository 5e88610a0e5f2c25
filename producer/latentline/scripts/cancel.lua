-- Cancel a job: at once when it is queued; when it runs, its worker gets a signal and settles it.
--
-- Invariants:
-- * A terminal job stays as it is.
-- * Once cancel_requested is set, the job is never queued again: release, retry and reclaim cancel it instead.
--
-- Returns 1, or 0 for a terminal or unknown job.
-- uses: jobs, memory_bound, signals

local id, retention_s = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'worker', 'token')
local status, worker, token = job[1], job[2], job[3]
if status ~= 'queued' and status ~= 'running' then return 0 end
memory_bound.pass(keys.leases())
redis.call('HSET', keys.job(id), 'cancel_requested', 1)
if status == 'queued' then jobs.finish(id, 'cancelled', nil, retention_s) else signals.send(worker, id, token, 'cancel') end
return 1
