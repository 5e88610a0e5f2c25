"""The transitions of one job, from submission to its end."""

from __future__ import annotations

from .prelude import PRELUDE, TIME

# ARGV id, request, num_steps, model, tenant, priority, order, deadline_s, cost, cap, idempotency key, fingerprint,
# retention_s, callback url, callback events
SUBMIT = (
    PRELUDE
    + """
local id, model, tenant, retention = ARGV[1], ARGV[4], ARGV[5], ARGV[13]
if ARGV[12] ~= '' then
  local kept = redis.call('HMGET', ARGV[11], 'id', 'fingerprint')
  if kept[1] then
    return {kept[2] == ARGV[12] and 'same' or 'conflict', kept[1]}
  end
end
local owed, cap = tonumber(redis.call('HGET', P .. 'tenants', tenant) or 0), tonumber(ARGV[10])
if cap > 0 and owed > 0 and owed + ARGV[9] > cap then return {'full', tostring(owed)} end
if ARGV[12] ~= '' then
  redis.call('HSET', ARGV[11], 'id', id, 'fingerprint', ARGV[12])
  redis.call('EXPIRE', ARGV[11], retention)
end
-- A tenant keeps its shard while it has jobs; one that comes anew takes the one with the fewest tenants, of those the emptiest.
local shard = redis.call('HGET', P .. 'shards:' .. model, tenant)
if not shard then
  local tenants, least = {}, nil
  for _, s in ipairs(redis.call('HVALS', P .. 'shards:' .. model)) do tenants[s] = (tenants[s] or 0) + 1 end
  for s = 0, NUM_SHARDS - 1 do
    local length, queue = 0, 'latentline.generate.' .. model .. '.' .. s
    for _, step in ipairs(STEPS) do length = length + redis.call('LLEN', list_of(queue, step)) end
    local load = (tenants[tostring(s)] or 0) * 1e9 + length
    if not least or load < least then least, shard = load, s end
  end
  redis.call('HSET', P .. 'shards:' .. model, tenant, shard)
end
redis.call('HINCRBY', P .. 'open:' .. model, tenant, 1)
redis.call('HINCRBY', P .. 'tenants', tenant, ARGV[9])
local ms = math.floor(t[1] * 1000 + t[2] / 1000)
local order = string.format('%.0f', tonumber(ARGV[7]) * 1e14 + redis.call('INCR', P .. 'messages'))
redis.call('HSET', job_key(id), 'id', id, 'request', ARGV[2], 'status', 'queued', 'step', 0, 'num_steps', ARGV[3],
           'attempt', 0, 'token', 0, 'errors', 0, 'crashes', 0, 'crashes_alone', 0, 'model', model, 'tenant', tenant,
           'priority', ARGV[6], 'queue', 'latentline.generate.' .. model .. '.' .. shard, 'cost', ARGV[9],
           'created_at', string.format('%d.%03d', math.floor(ms / 1000), ms % 1000), 'score', ms, 'order', order)
if tonumber(ARGV[8]) > 0 then redis.call('HSET', job_key(id), 'deadline_at', later(ARGV[8])) end
if ARGV[14] ~= '' then redis.call('HSET', job_key(id), 'callback_url', ARGV[14], 'callback_events', ARGV[15]) end
redis.call('ZADD', P .. 'jobs', ms, id)
redis.call('ZADD', P .. 'jobs:queued', ms, id)
redis.call('ZADD', P .. 'waiting:' .. model, order, id)
event(id, 'job.queued', {status = 'queued'})
wake_job(id, false)
return {'new', redis.call('HGETALL', job_key(id)), redis.call('ZRANK', P .. 'waiting:' .. model, id)}
"""
)


# ARGV id, worker, lease_s, retention_s, alone ('1': the worker runs nothing else meanwhile), mark of this claim
CLAIM = (
    PRELUDE
    + """
local id = ARGV[1]
local job = redis.call('HMGET', job_key(id), 'status', 'claim', 'deadline_at', 'score', 'model', 'checkpoint_step')
if not job[1] then return 'unknown' end
if job[1] == 'running' and job[2] == ARGV[6] then return redis.call('HGETALL', job_key(id)) end  -- the first answer was lost
if job[1] == 'running' then return 'taken' end  -- also when its lease has run out: that is the reaper's, who writes a new message
if job[1] ~= 'queued' then return 'done' end
local due = redis.call('ZSCORE', P .. 'delayed', id)
if due and tonumber(due) > tonumber(now) then return 'delayed' end
if job[3] and tonumber(job[3]) <= tonumber(now) then
  finish(id, 'failed', {code = 'deadline_exceeded', message = 'the deadline passed before the job started'}, ARGV[4])
  return 'done'
end
-- First what a broker without memory refuses: it must not give out jobs whose end it could not take.
redis.call('HINCRBY', job_key(id), 'attempt', 1)
redis.call('HINCRBY', job_key(id), 'token', 1)
leave(id, job[5])
redis.call('ZADD', P .. 'jobs:running', job[4], id)
redis.call('ZADD', P .. 'leases', later(ARGV[3]), id)
redis.call('HSET', job_key(id), 'status', 'running', 'phase', 'encoding', 'step', job[6] or 0, 'worker', ARGV[2], 'started_at', now,
           'lease_until', later(ARGV[3]), 'alone', ARGV[5], 'claim', ARGV[6])
callback(id, 'job.running', event(id, 'job.running', {status = 'running', worker = ARGV[2], step = tonumber(job[6] or 0)}), ARGV[4])
return redis.call('HGETALL', job_key(id))
"""
)


# ARGV id, token, phase, step, lease_s, batch_jobs, previews
BEAT = (
    TIME
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 'stale' end
in_any_case()
redis.call('HSET', key, 'lease_until', later(ARGV[5]), 'phase', ARGV[3], 'step', ARGV[4])
redis.call('ZADD', P .. 'leases', later(ARGV[5]), id)
if job[3] ~= ARGV[3] or job[4] ~= ARGV[4] then
  event(id, 'job.progress', {phase = ARGV[3], step = tonumber(ARGV[4]), num_steps = tonumber(job[5]), batch_jobs = tonumber(ARGV[6])})
end
if ARGV[7] ~= '' then
  event(id, 'job.preview', {step = tonumber(ARGV[4]), num_steps = tonumber(job[5]), images = cjson.decode(ARGV[7])})
end
if job[6] == '1' then return 'cancel' end
if job[7] and tonumber(job[7]) <= tonumber(now) then return 'expired' end
return 'go'
"""
)


# ARGV id, token, step in the job's own steps, bytes, ttl_s
CHECKPOINT = (
    TIME
    + """
local job = redis.call('HMGET', job_key(ARGV[1]), 'status', 'token')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 0 end
local kept = redis.pcall('SET', P .. 'checkpoint:' .. ARGV[1], ARGV[4], 'EX', ARGV[5])
if kept.err then return string.find(kept.err, 'OOM', 1, true) and 0 or kept end
redis.call('HSET', job_key(ARGV[1]), 'checkpoint_step', ARGV[3])
return 1
"""
)


# ARGV id, retention_s
CANCEL = (
    PRELUDE
    + """
local status = redis.call('HGET', job_key(ARGV[1]), 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
in_any_case()
redis.call('HSET', job_key(ARGV[1]), 'cancel_requested', 1)
if status == 'queued' then finish(ARGV[1], 'cancelled', nil, ARGV[2]) end
return 1
"""
)


# ARGV id, token, retention_s
RELEASE = (
    PRELUDE
    + """
local job = redis.call('HMGET', job_key(ARGV[1]), 'status', 'token', 'cancel_requested')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 0 end
in_any_case()
if job[3] == '1' then finish(ARGV[1], 'cancelled', nil, ARGV[3]) else requeue(ARGV[1], 0, true) end
return 1
"""
)


# ARGV id, token, status, images, error, timings, retention_s
SETTLE = (
    PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'num_steps')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
in_any_case()
redis.call('HSET', key, 'images', ARGV[4], 'timings', ARGV[6])
if ARGV[3] == 'succeeded' then redis.call('HSET', key, 'step', job[3]) end
finish(id, ARGV[3], ARGV[5] ~= '' and cjson.decode(ARGV[5]) or nil, ARGV[7])
return redis.call('HGETALL', key)
"""
)


# ARGV id, token, error, first_delay_s, most_delay_s, jitter (0 to 1), max_errors, retention_s; the status and the delay that came of it
RETRY = (
    PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'cancel_requested', 'deadline_at')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
in_any_case()
local error = cjson.decode(ARGV[3])
local errors = redis.call('HINCRBY', key, 'errors', 1)
local delay_s = math.min(tonumber(ARGV[5]), ARGV[4] * 2 ^ (errors - 1)) * ARGV[6]
if job[3] == '1' then
  finish(id, 'cancelled', nil, ARGV[8])
elseif errors >= tonumber(ARGV[7]) or (job[4] and tonumber(job[4]) <= now + delay_s) then
  bury(id, {code = error.code, reason = error.message, errors = errors})
  finish(id, 'failed', error, ARGV[8])
else
  requeue(id, delay_s, false)
end
return {redis.call('HGET', key, 'status'), tostring(delay_s)}
"""
)
