-- Fail one queued job if its deadline has passed. Readers call this, so that deadlines are kept when no worker is left.
--
-- Invariant: only a queued job whose deadline has passed on the broker's clock is failed, whatever the reader's clock says.
--
-- Returns 1 when the job was failed, else 0.
-- uses: jobs, memory_bound

local id, default_retention_s = unpack(ARGV)

local retention_s = redis.call('HGET', keys.job(id), 'retention_s') or default_retention_s
memory_bound.pass(keys.deadlines())
return jobs.end_if_overdue(id, retention_s) and 1 or 0
