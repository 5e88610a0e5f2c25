-- Fail the queued jobs whose deadline has passed.
--
-- Invariants:
-- * A queued job is failed at its deadline whether or not a worker could take it, which frees its share of the tenant's cap.
-- * The worker of a running job enforces its deadline. If that worker is lost, reclaim.lua ends the job, and if it releases
--   the job, requeue() in lib/jobs.lua restores the entry. A running job stays in the index and is checked again after again_s.
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
