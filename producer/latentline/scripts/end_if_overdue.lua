-- Fail one queued job if its deadline has passed: readers call this, so that they learn of it when no worker is left.
--
-- Invariant: nothing happens before the deadline, whatever the reader's clock says, nor to a job that is not queued.
--
-- Returns 1 when the job was failed, else 0.
-- uses: jobs, memory_bound

local id, default_retention_s = unpack(ARGV)

local retention_s = redis.call('HGET', keys.job(id), 'retention_s') or default_retention_s
memory_bound.pass(keys.deadlines())
return jobs.end_if_overdue(id, retention_s) and 1 or 0
