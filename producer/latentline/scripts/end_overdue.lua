-- Fail the queued jobs whose deadline has passed.
--
-- Invariants:
-- * A job that waits is ended at its deadline whether or not a worker could take it, so it costs its tenant nothing more.
-- * The deadline of a running job is its worker's to keep. Should that worker be lost, the job is queued again or ended by
--   reclaim.lua, so a running job stays in the index and is looked at again after again_s.
-- * Entries of jobs that have ended are removed: workers of version 0.1.0 leave them behind.
--
-- Returns the ids of the jobs that were failed.
-- uses: clock, jobs, memory_bound

local most, again_s, retention_s = unpack(ARGV)

local ended = {}
memory_bound.pass(keys.deadlines())
for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.deadlines(), '-inf', clock.now, 'LIMIT', 0, most)) do
  if jobs.end_if_overdue(id, retention_s) then
    ended[#ended + 1] = id
  elseif redis.call('HGET', keys.job(id), 'status') == 'running' then
    redis.call('ZADD', keys.deadlines(), clock.after(again_s), id)
  else
    redis.call('ZREM', keys.deadlines(), id)
  end
end
return ended
