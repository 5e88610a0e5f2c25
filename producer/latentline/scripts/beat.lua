-- Renew a job's lease and store its progress.
--
-- Invariants:
-- * Only the holder of the newest token renews.
-- * An event is written only for progress: a beat that reports the same step again adds none.
-- * A lease is renewed on a broker at its memory bound too.
--
-- Returns what the worker has to do: 'go', 'cancel', 'expired' (the deadline has passed) or 'stale' (the job is not its own).
-- uses: clock, events, memory_bound

local id, token, phase, step, lease_s, batch_jobs, previews = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at')
local num_steps, cancel_requested, deadline_at = tonumber(job[5]), job[6], job[7]
if job[1] ~= 'running' or job[2] ~= token then return 'stale' end
memory_bound.pass(keys.leases())
redis.call('HSET', key, 'lease_until', clock.after(lease_s), 'phase', phase, 'step', step)
redis.call('ZADD', keys.leases(), clock.after(lease_s), id)
if job[3] ~= phase or job[4] ~= step then
  local data = {phase = phase, step = tonumber(step), num_steps = num_steps, batch_jobs = tonumber(batch_jobs)}
  events.add(id, 'job.progress', data)
end
if previews ~= '' then
  events.add(id, 'job.preview', {step = tonumber(step), num_steps = num_steps, images = cjson.decode(previews)})
end
if cancel_requested == '1' then return 'cancel' end
return clock.reached(deadline_at) and 'expired' or 'go'
