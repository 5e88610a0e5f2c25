-- Take a job away from a lost worker: queue it again, or fail it if it seems to be what crashes its workers.
--
-- Invariants:
-- * Nothing is taken while the lease runs.
-- * A crash counts against a job only if its step was not above `furthest`, the highest step of its earlier crashes: a job
--   that crashes its workers does so at the same step each time.
-- * A job whose deadline has passed is not queued again.
-- * A job fails for lost workers only after max_crashes_alone counted crashes on which no other job ran beside it.
--
-- Its worker gets a signal: it may be alive, and then stops working on the job.
--
-- Returns 1 when the job was taken away, else 0.
-- uses: clock, jobs, memory_bound, signals

local id, max_crashes_alone, retention_s = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'status', 'lease_until', 'cancel_requested', 'alone', 'step', 'furthest', 'deadline_at',
  'worker', 'token')
local status, lease_until, cancel_requested, ran_alone = job[1], job[2], job[3], job[4]
local step, furthest, deadline_at, worker, token = job[5], job[6], job[7], job[8], job[9]
if status ~= 'running' then
  redis.call('ZREM', keys.leases(), id)
  if not status then redis.call('ZREM', keys.index('running'), id) end -- its record has expired
  return 0
end
if tonumber(lease_until or 0) > clock.seconds then return 0 end
memory_bound.pass(keys.leases())
local further = tonumber(step) > tonumber(furthest or 0)
if further then redis.call('HSET', key, 'furthest', step, 'crashes_alone', 0) end
local crashes = redis.call('HINCRBY', key, 'crashes', further and 0 or 1)
local crashes_alone = redis.call('HINCRBY', key, 'crashes_alone', (not further and ran_alone == '1') and 1 or 0)
if cancel_requested == '1' then
  jobs.finish(id, 'cancelled', nil, retention_s)
elseif clock.reached(deadline_at) then
  jobs.finish(id, 'failed', {code = 'deadline_exceeded', message = 'the deadline passed when its worker was lost'}, retention_s)
elseif crashes_alone >= tonumber(max_crashes_alone) then
  local message = 'workers that ran this job and nothing else were lost ' .. crashes_alone .. ' times'
  jobs.bury(id, {code = 'worker_lost', reason = message, crashes = crashes})
  jobs.finish(id, 'failed', {code = 'worker_lost', message = message}, retention_s)
else
  jobs.requeue(id, 0, true, 'lost')
end
signals.send(worker, id, token, 'stale')
return 1
