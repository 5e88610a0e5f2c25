"""The Lua behind :mod:`latentline.records`. Each script is one transition; time is the server's own."""

from __future__ import annotations

# Shared beginnings of all scripts: seconds as text with microseconds, and a way to write an event.
_PRELUDE = """
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
local function event(kind, data)
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'type', kind, 'at', now, 'data', cjson.encode(data))
end
"""

# KEYS job, events, index, index:queued, waiting, queue list, idempotency
# ARGV id, request, num_steps, priority step, deadline_s, wake-up, fingerprint, retention_s
SUBMIT = (
    _PRELUDE
    + """
if ARGV[7] ~= '' then
  local kept = redis.call('HMGET', KEYS[7], 'id', 'fingerprint')
  if kept[1] then
    if kept[2] == ARGV[7] then return {'same', kept[1]} end
    return {'conflict', kept[1]}
  end
  redis.call('HSET', KEYS[7], 'id', ARGV[1], 'fingerprint', ARGV[7])
  redis.call('EXPIRE', KEYS[7], ARGV[8])
end
local ms = math.floor(t[1] * 1000 + t[2] / 1000)
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'request', ARGV[2], 'status', 'queued', 'step', 0, 'num_steps', ARGV[3],
           'attempt', 0, 'token', 0, 'created_at', string.format('%d.%03d', math.floor(ms / 1000), ms % 1000),
           'score', ms, 'order', tonumber(ARGV[4]) * 1e14 + ms)
if tonumber(ARGV[5]) > 0 then redis.call('HSET', KEYS[1], 'deadline_at', string.format('%.6f', now + ARGV[5])) end
redis.call('ZADD', KEYS[3], ms, ARGV[1])
redis.call('ZADD', KEYS[4], ms, ARGV[1])
redis.call('ZADD', KEYS[5], string.format('%.0f', tonumber(ARGV[4]) * 1e14 + ms), ARGV[1])
event('job.queued', {status = 'queued'})
redis.call('LPUSH', KEYS[6], ARGV[6])
return {'new', redis.call('HGETALL', KEYS[1]), redis.call('ZRANK', KEYS[5], ARGV[1])}
"""
)

# KEYS job, events, waiting, index:queued, index:running, index:failed; ARGV id, worker, lease_s, retention_s
CLAIM = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'lease_until', 'deadline_at', 'score')
local status = job[1]
if status ~= 'queued' and status ~= 'running' then return false end
if status == 'running' and job[2] and tonumber(job[2]) > tonumber(now) then return false end
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
if job[3] and tonumber(job[3]) <= tonumber(now) then
  local error = {code = 'deadline_exceeded', message = 'the deadline passed before the job started'}
  redis.call('ZREM', KEYS[5], ARGV[1])
  redis.call('ZADD', KEYS[6], job[4], ARGV[1])
  redis.call('HSET', KEYS[1], 'status', 'failed', 'finished_at', now, 'error', cjson.encode(error))
  redis.call('HINCRBY', KEYS[1], 'token', 1)
  event('job.failed', {status = 'failed', error = error})
  redis.call('EXPIRE', KEYS[1], ARGV[4])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  return false
end
redis.call('ZADD', KEYS[5], job[4], ARGV[1])
redis.call('HINCRBY', KEYS[1], 'attempt', 1)
redis.call('HINCRBY', KEYS[1], 'token', 1)
redis.call('HSET', KEYS[1], 'status', 'running', 'phase', 'encoding', 'step', 0, 'worker', ARGV[2], 'started_at', now,
           'lease_until', string.format('%.6f', now + ARGV[3]))
event('job.running', {status = 'running', worker = ARGV[2]})
return redis.call('HGETALL', KEYS[1])
"""
)

# KEYS job, events; ARGV id, token, phase, step, lease_s, batch_jobs, previews
BEAT = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 'stale' end
redis.call('HSET', KEYS[1], 'lease_until', string.format('%.6f', now + ARGV[5]), 'phase', ARGV[3], 'step', ARGV[4])
if job[3] ~= ARGV[3] or job[4] ~= ARGV[4] then
  event('job.progress', {phase = ARGV[3], step = tonumber(ARGV[4]), num_steps = tonumber(job[5]), batch_jobs = tonumber(ARGV[6])})
end
if ARGV[7] ~= '' then
  event('job.preview', {step = tonumber(ARGV[4]), num_steps = tonumber(job[5]), images = cjson.decode(ARGV[7])})
end
if job[6] == '1' then return 'cancel' end
if job[7] and tonumber(job[7]) <= tonumber(now) then return 'expired' end
return 'go'
"""
)

# KEYS job, events, waiting, index:queued, index:cancelled; ARGV id, retention_s
CANCEL = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'score')
if job[1] == 'queued' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('ZADD', KEYS[5], job[2], ARGV[1])
  redis.call('HSET', KEYS[1], 'status', 'cancelled', 'finished_at', now, 'cancel_requested', 1)
  redis.call('HINCRBY', KEYS[1], 'token', 1)
  event('job.cancelled', {status = 'cancelled'})
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
elseif job[1] == 'running' then
  redis.call('HSET', KEYS[1], 'cancel_requested', 1)
end
return 1
"""
)

# KEYS job, events, waiting, index:queued, index:running, queue list, index:cancelled; ARGV id, token, wake-up, retention_s
RELEASE = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'token', 'score', 'order', 'cancel_requested')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
redis.call('HINCRBY', KEYS[1], 'token', 1)
if job[5] == '1' then
  redis.call('HSET', KEYS[1], 'status', 'cancelled', 'finished_at', now)
  redis.call('HDEL', KEYS[1], 'phase', 'lease_until')
  redis.call('ZREM', KEYS[5], ARGV[1])
  redis.call('ZADD', KEYS[7], job[3], ARGV[1])
  event('job.cancelled', {status = 'cancelled'})
  redis.call('EXPIRE', KEYS[1], ARGV[4])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  return 1
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'step', 0)
redis.call('HDEL', KEYS[1], 'phase', 'worker', 'lease_until', 'started_at')
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('ZADD', KEYS[4], job[3], ARGV[1])
redis.call('ZADD', KEYS[3], job[4], ARGV[1])
event('job.queued', {status = 'queued'})
redis.call('RPUSH', KEYS[6], ARGV[3])
return 1
"""
)

# KEYS job, events, index:running, index:<status>; ARGV id, token, status, images, error, timings, retention_s
SETTLE = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'token', 'score', 'num_steps')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'finished_at', now, 'images', ARGV[4], 'timings', ARGV[6])
redis.call('HDEL', KEYS[1], 'phase', 'lease_until')
local data = {status = ARGV[3]}
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'error', ARGV[5])
  data.error = cjson.decode(ARGV[5])
end
if ARGV[3] == 'succeeded' then redis.call('HSET', KEYS[1], 'step', job[4]) end
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], job[3], ARGV[1])
event('job.' .. ARGV[3], data)
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[7])
return redis.call('HGETALL', KEYS[1])
"""
)

# KEYS as RELEASE, and index:failed; ARGV id, wake-up, max_attempts, retention_s
RECLAIM = (
    _PRELUDE
    + """
local job = redis.call('HMGET', KEYS[1], 'status', 'lease_until', 'score', 'order', 'cancel_requested', 'attempt')
if job[1] ~= 'running' or tonumber(job[2] or 0) > tonumber(now) then return false end
redis.call('HINCRBY', KEYS[1], 'token', 1)
redis.call('HDEL', KEYS[1], 'phase', 'lease_until')
redis.call('ZREM', KEYS[5], ARGV[1])
local function finish(status, index, data)
  redis.call('HSET', KEYS[1], 'status', status, 'finished_at', now)
  redis.call('ZADD', index, job[3], ARGV[1])
  event('job.' .. status, data)
  redis.call('EXPIRE', KEYS[1], ARGV[4])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
if job[5] == '1' then
  finish('cancelled', KEYS[7], {status = 'cancelled'})
elseif tonumber(job[6]) >= tonumber(ARGV[3]) then
  local error = {code = 'worker_lost', message = 'every worker that took the job was lost'}
  redis.call('HSET', KEYS[1], 'error', cjson.encode(error))
  finish('failed', KEYS[8], {status = 'failed', error = error})
else
  redis.call('HSET', KEYS[1], 'status', 'queued', 'step', 0)
  redis.call('HDEL', KEYS[1], 'worker', 'started_at')
  redis.call('ZADD', KEYS[4], job[3], ARGV[1])
  redis.call('ZADD', KEYS[3], job[4], ARGV[1])
  event('job.queued', {status = 'queued'})
  redis.call('RPUSH', KEYS[6], ARGV[2])
end
return 1
"""
)
