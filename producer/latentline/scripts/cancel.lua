-- Cancel a job: at once when it is queued; when it runs, its worker is told and settles it.
--
-- Invariants:
-- * A terminal job stays as it is.
-- * Once cancel_requested is set, the job is never queued again: release, retry and reclaim cancel it instead.
--
-- Returns 1, or 0 for a terminal or unknown job.
-- uses: jobs, memory_bound

local id, retention_s = unpack(ARGV)

local status = redis.call('HGET', keys.job(id), 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
memory_bound.pass(keys.leases())
redis.call('HSET', keys.job(id), 'cancel_requested', 1)
if status == 'queued' then jobs.finish(id, 'cancelled', nil, retention_s) end
return 1
