-- A job's worker reports a retryable error.
--
-- Invariants:
-- * Only the holder of the newest token retries.
-- * A job whose cancellation was asked for is cancelled. One with max_errors errors, or whose next try would begin after its
--   deadline, fails and leaves a dead letter.
-- * The delay doubles with each error up to max_delay_s, and is multiplied by jitter (0 to 1).
--
-- `account` is what the worker tells of this attempt, for the job's timeline; it may be empty.
--
-- Returns {status, delay in seconds}, or false for a stale token.
-- uses: clock, jobs, memory_bound

local id, token, err, first_delay_s, max_delay_s, jitter, max_errors, retention_s, account = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'status', 'token', 'cancel_requested', 'deadline_at')
local cancel_requested, deadline_at = job[3], job[4]
if job[1] ~= 'running' or job[2] ~= token then return false end
memory_bound.pass(keys.leases())
local failure = cjson.decode(err)
local errors = redis.call('HINCRBY', key, 'errors', 1)
local delay_s = math.min(tonumber(max_delay_s), first_delay_s * 2 ^ (errors - 1)) * jitter
if cancel_requested == '1' then
  jobs.finish(id, 'cancelled', nil, retention_s, account)
elseif errors >= tonumber(max_errors) or (deadline_at and tonumber(deadline_at) <= clock.seconds + delay_s) then
  jobs.bury(id, {code = failure.code, reason = failure.message, errors = errors})
  jobs.finish(id, 'failed', failure, retention_s, account)
else
  jobs.requeue(id, delay_s, false, 'error', account)
end
return {redis.call('HGET', key, 'status'), tostring(delay_s)}
