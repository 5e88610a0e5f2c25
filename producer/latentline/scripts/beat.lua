-- Store what a worker reports of its jobs, and renew their leases: one call for all jobs that have something to report.
--
-- `beats` is a JSON array of {id, token, phase, step, lease_s, batch_jobs, previews}. With lease_s 0 the lease stays as it is.
-- `previews` is a JSON array as text, or empty.
--
-- Invariants:
-- * Only the holder of the newest token reports and renews. A stale job changes nothing for those beside it.
-- * An event is written only for progress: reporting the same phase and step again adds none.
-- * A lease is renewed on a broker at its memory bound too.
--
-- Cost: two commands, and for each job at most four, or seven with a preview.
--
-- Returns for each beat what the worker has to do with the job: 'go', 'cancel', 'expired' (the deadline has passed) or 'stale'
-- (the job is not its own).
-- uses: clock, events, memory_bound

local beats = unpack(ARGV)

local function report(beat)
  local id, phase, step = beat.id, beat.phase, beat.step
  local key = keys.job(id)
  local job = redis.call('HMGET', key, 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at', 'seq')
  local num_steps, cancel_requested, deadline_at = tonumber(job[5]), job[6], job[7]
  if job[1] ~= 'running' or job[2] ~= tostring(beat.token) then return 'stale' end

  local fields = {}
  if beat.lease_s > 0 then
    local lease_until = clock.after(beat.lease_s)
    fields = {'lease_until', lease_until}
    redis.call('ZADD', keys.leases(), lease_until, id)
  end
  local progress
  if job[3] ~= phase or tonumber(job[4]) ~= step then
    local seq = tonumber(job[8] or 0) + 1
    progress = {phase = phase, step = step, num_steps = num_steps, batch_jobs = beat.batch_jobs, seq = seq}
    for _, field in ipairs({'phase', phase, 'step', step, 'seq', seq}) do fields[#fields + 1] = field end
  end
  if #fields > 0 then redis.call('HSET', key, unpack(fields)) end
  if progress then events.append(id, 'job.progress', cjson.encode(progress)) end
  if beat.previews ~= '' then
    events.add_preview(id, {step = step, num_steps = num_steps}, beat.previews)
  end
  if cancel_requested == '1' then return 'cancel' end
  return clock.reached(deadline_at) and 'expired' or 'go'
end

memory_bound.pass(keys.leases())
local verdicts = {}
for i, beat in ipairs(cjson.decode(beats)) do verdicts[i] = report(beat) end
return verdicts
