"""The Lua behind :mod:`latentline.records`. Each script is one transition; time is the server's own.

Keys are derived inside of the scripts from the ids they are given: one Redis (with replicas), no cluster.
The state machine is drawn in ``docs/job-states.md``.
"""

from __future__ import annotations

from . import routing

# Filled in by Lua; none of the marks needs escaping in JSON. The priority stands unquoted in the message.
_TEMPLATE = routing.wake_up("@task@", "@argument@", "@queue@", "@priority@", "@message@").replace('"@priority@"', "@priority@")

_TIME = """
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
local P = 'latentline:'
local function job_key(id) return P .. 'job:' .. id end
local function event(id, kind, data)
  data.seq = redis.call('HINCRBY', job_key(id), 'seq', 1)
  redis.call('XADD', P .. 'events:' .. id, 'MAXLEN', '~', 1000, '*', 'type', kind, 'at', now, 'data', cjson.encode(data))
  return data.seq
end
"""

# What the transitions share.
_PRELUDE = (
    _TIME
    + f"""
local TEMPLATE = [==[{_TEMPLATE}]==]
local GENERATE, CALLBACK, CALLBACK_QUEUE = '{routing.GENERATE_TASK}', '{routing.CALLBACK_TASK}', '{routing.CALLBACK_QUEUE}'
local SEPARATOR, NUM_SHARDS, STEPS = '\\6\\22', {routing.NUM_SHARDS}, {{ {", ".join(map(str, routing.PRIORITY_STEPS))} }}
"""
    + """
local function later(seconds) return string.format('%.6f', now + seconds) end

local function list_of(queue, priority)
  local step = 0
  for _, s in ipairs(STEPS) do if s <= priority then step = s end end
  return step == 0 and queue or queue .. SEPARATOR .. step
end

-- A Celery message, at the front of its list or at the end; its id. The numbers in the ids of those at the end rise.
local function wake(task, argument, queue, priority, front)
  local message = argument .. '-' .. redis.call('INCR', P .. 'messages') .. (front and 'f' or '')
  local fill = {task = task, argument = argument, queue = queue, priority = tostring(priority), message = message}
  local text = string.gsub(TEMPLATE, '@(%l+)@', fill)
  redis.call(front and 'RPUSH' or 'LPUSH', list_of(queue, priority), text)
  return message
end

local function wake_job(id, front)
  local job = redis.call('HMGET', job_key(id), 'queue', 'priority')
  local message = wake(GENERATE, id, job[1], tonumber(job[2]), front)
  redis.call('HSET', job_key(id), 'woken_at', now, 'message', message)
end

-- The outbox: written together with the event that it tells of.
local function callback(id, kind, seq, retention)
  local job = redis.call('HMGET', job_key(id), 'callback_url', 'callback_events', 'attempt')
  if not job[1] or not string.find(job[2], '"' .. kind .. '"', 1, true) then return end
  local name = string.sub(kind, 5)
  local cid = 'msg_' .. id .. '_' .. name .. (name == 'running' and '_' .. job[3] or '')
  local key = P .. 'callback:' .. cid
  if redis.call('EXISTS', key) == 1 then return end
  redis.call('HSET', key, 'id', cid, 'job_id', id, 'type', kind, 'seq', seq, 'url', job[1], 'at', now, 'status', 'pending',
             'tries', 0, 'due', now, 'record', cjson.encode(redis.call('HGETALL', job_key(id))))
  redis.call('EXPIRE', key, retention)
  redis.call('ZADD', P .. 'callbacks', now, cid)
  redis.call('ZADD', P .. 'callbacks:due', now, cid)
  wake(CALLBACK, cid, CALLBACK_QUEUE, 0, false)
end

local function leave(id, model)
  redis.call('ZREM', P .. 'waiting:' .. model, id)
  redis.call('ZREM', P .. 'jobs:queued', id)
  redis.call('ZREM', P .. 'jobs:running', id)
  redis.call('ZREM', P .. 'delayed', id)
end

local function bury(id, dead)
  dead.at, dead.id = now, id
  redis.call('HSET', P .. 'dead', id, cjson.encode(dead))
end

-- The one way into a terminal status.
local function finish(id, status, error, retention)
  local job = redis.call('HMGET', job_key(id), 'model', 'score', 'tenant', 'cost')
  leave(id, job[1])
  redis.call('ZADD', P .. 'jobs:' .. status, job[2], id)
  redis.call('HDEL', job_key(id), 'phase', 'lease_until')
  redis.call('HSET', job_key(id), 'status', status, 'finished_at', now)
  redis.call('HINCRBY', job_key(id), 'token', 1)
  local data = {status = status}
  if error then
    redis.call('HSET', job_key(id), 'error', cjson.encode(error))
    data.error = error
  end
  if redis.call('HINCRBY', P .. 'tenants', job[3], -job[4]) <= 0 then redis.call('HDEL', P .. 'tenants', job[3]) end
  callback(id, 'job.' .. status, event(id, 'job.' .. status, data), retention)
  redis.call('DEL', P .. 'checkpoint:' .. id)
  redis.call('ZADD', P .. 'expiring', later(retention), job[3] .. '/' .. id)
  redis.call('EXPIRE', job_key(id), retention)
  redis.call('EXPIRE', P .. 'events:' .. id, retention)
end

-- From running back to queued, for now or for later.
local function requeue(id, delay_s, front)
  local job = redis.call('HMGET', job_key(id), 'model', 'score', 'order', 'checkpoint_step')
  leave(id, job[1])
  redis.call('HINCRBY', job_key(id), 'token', 1)
  redis.call('HSET', job_key(id), 'status', 'queued', 'step', job[4] or 0)
  redis.call('HDEL', job_key(id), 'phase', 'worker', 'lease_until', 'started_at')
  redis.call('ZADD', P .. 'jobs:queued', job[2], id)
  redis.call('ZADD', P .. 'waiting:' .. job[1], job[3], id)
  event(id, 'job.queued', {status = 'queued', step = tonumber(job[4] or 0), delay_s = delay_s})
  if delay_s > 0 then
    redis.call('ZADD', P .. 'delayed', later(delay_s), id)
    redis.call('HSET', job_key(id), 'woken_at', later(delay_s))
  else
    wake_job(id, front)
  end
end
"""
)

# ARGV id, request, num_steps, model, tenant, priority, order, deadline_s, cost, cap, idempotency key, fingerprint,
# retention_s, callback url, callback events
SUBMIT = (
    _PRELUDE
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
-- A tenant keeps its shard while it has jobs; one that comes anew takes the emptiest.
local shard = redis.call('HGET', P .. 'shards:' .. model, tenant)
if not shard or owed == 0 then
  local least
  for s = 0, NUM_SHARDS - 1 do
    local length, queue = 0, 'latentline.generate.' .. model .. '.' .. s
    for _, step in ipairs(STEPS) do length = length + redis.call('LLEN', list_of(queue, step)) end
    if not least or length < least then least, shard = length, s end
  end
  redis.call('HSET', P .. 'shards:' .. model, tenant, shard)
end
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

# ARGV id, worker, lease_s, retention_s, alone ('1': the worker runs nothing else meanwhile)
CLAIM = (
    _PRELUDE
    + """
local id = ARGV[1]
local job = redis.call('HMGET', job_key(id), 'status', 'lease_until', 'deadline_at', 'score', 'model', 'checkpoint_step')
if not job[1] then return 'unknown' end
if job[1] ~= 'queued' and job[1] ~= 'running' then return 'done' end
if job[1] == 'running' and tonumber(job[2] or 0) > tonumber(now) then return 'taken' end
local due = redis.call('ZSCORE', P .. 'delayed', id)
if due and tonumber(due) > tonumber(now) then return 'delayed' end
if job[3] and tonumber(job[3]) <= tonumber(now) then
  finish(id, 'failed', {code = 'deadline_exceeded', message = 'the deadline passed before the job started'}, ARGV[4])
  return 'done'
end
leave(id, job[5])
redis.call('ZADD', P .. 'jobs:running', job[4], id)
redis.call('HINCRBY', job_key(id), 'attempt', 1)
redis.call('HINCRBY', job_key(id), 'token', 1)
redis.call('HSET', job_key(id), 'status', 'running', 'phase', 'encoding', 'step', job[6] or 0, 'worker', ARGV[2], 'started_at', now,
           'lease_until', later(ARGV[3]), 'alone', ARGV[5])
callback(id, 'job.running', event(id, 'job.running', {status = 'running', worker = ARGV[2], step = tonumber(job[6] or 0)}), ARGV[4])
return redis.call('HGETALL', job_key(id))
"""
)

# ARGV id, token, phase, step, lease_s, batch_jobs, previews
BEAT = (
    _TIME
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 'stale' end
redis.call('HSET', key, 'lease_until', string.format('%.6f', now + ARGV[5]), 'phase', ARGV[3], 'step', ARGV[4])
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
    _TIME
    + """
local job = redis.call('HMGET', job_key(ARGV[1]), 'status', 'token')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 0 end
redis.call('SET', P .. 'checkpoint:' .. ARGV[1], ARGV[4], 'EX', ARGV[5])
redis.call('HSET', job_key(ARGV[1]), 'checkpoint_step', ARGV[3])
return 1
"""
)

# ARGV id, retention_s
CANCEL = (
    _PRELUDE
    + """
local status = redis.call('HGET', job_key(ARGV[1]), 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
redis.call('HSET', job_key(ARGV[1]), 'cancel_requested', 1)
if status == 'queued' then finish(ARGV[1], 'cancelled', nil, ARGV[2]) end
return 1
"""
)

# ARGV id, token, retention_s
RELEASE = (
    _PRELUDE
    + """
local job = redis.call('HMGET', job_key(ARGV[1]), 'status', 'token', 'cancel_requested')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return 0 end
if job[3] == '1' then finish(ARGV[1], 'cancelled', nil, ARGV[3]) else requeue(ARGV[1], 0, true) end
return 1
"""
)

# ARGV id, token, status, images, error, timings, retention_s
SETTLE = (
    _PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'num_steps')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
redis.call('HSET', key, 'images', ARGV[4], 'timings', ARGV[6])
if ARGV[3] == 'succeeded' then redis.call('HSET', key, 'step', job[3]) end
finish(id, ARGV[3], ARGV[5] ~= '' and cjson.decode(ARGV[5]) or nil, ARGV[7])
return redis.call('HGETALL', key)
"""
)

# ARGV id, token, error, delay_s, max_errors, retention_s
RETRY = (
    _PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'token', 'cancel_requested', 'deadline_at')
if job[1] ~= 'running' or job[2] ~= ARGV[2] then return false end
local error = cjson.decode(ARGV[3])
local errors = redis.call('HINCRBY', key, 'errors', 1)
if job[3] == '1' then
  finish(id, 'cancelled', nil, ARGV[6])
elseif errors >= tonumber(ARGV[5]) or (job[4] and tonumber(job[4]) <= now + ARGV[4]) then
  bury(id, {kind = 'job', job_id = id, code = error.code, reason = error.message, errors = errors})
  finish(id, 'failed', error, ARGV[6])
else
  requeue(id, tonumber(ARGV[4]), false)
end
return redis.call('HGET', key, 'status')
"""
)

# ARGV id, max_crashes_alone, retention_s
RECLAIM = (
    _PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'lease_until', 'cancel_requested', 'alone')
if job[1] ~= 'running' or tonumber(job[2] or 0) > tonumber(now) then return 0 end
local crashes = redis.call('HINCRBY', key, 'crashes', 1)
local alone = redis.call('HINCRBY', key, 'crashes_alone', job[4] == '1' and 1 or 0)
if job[3] == '1' then
  finish(id, 'cancelled', nil, ARGV[3])
elseif alone >= tonumber(ARGV[2]) then
  local error = {code = 'worker_lost', message = 'workers that ran this job and nothing else were lost ' .. alone .. ' times'}
  bury(id, {kind = 'job', job_id = id, code = error.code, reason = error.message, crashes = crashes})
  finish(id, 'failed', error, ARGV[3])
else
  requeue(id, 0, true)
end
return 1
"""
)

# Wake queued jobs again whose next try is due, or whose message is lost; their ids, and how many were looked at.
# ARGV model, grace_s, rank of the first waiting job to look at, most
WAKE = (
    _PRELUDE
    + """
local woken = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'delayed', '-inf', now, 'LIMIT', 0, ARGV[4])) do
  redis.call('ZREM', P .. 'delayed', id)
  if redis.call('HGET', job_key(id), 'status') == 'queued' then
    wake_job(id, true)
    woken[#woken + 1] = id
  end
end

-- What will be taken next from a list: the messages put at its front, and the number of the first behind them. Behind
-- that one numbers only rise, so a message with a lower one is not there any more.
local SCANNED = 512
local heads = {}
local function head_of(list)
  if heads[list] then return heads[list] end
  local head, i = {front = {}, number = math.huge}, -1
  while true do
    local text = redis.call('LINDEX', list, i)
    if not text then break end
    local message, number, mark = string.match(text, '"id": ?"([^"]*%-(%d+)(f?))"')
    if mark == '' then
      head.number = tonumber(number)
      break
    end
    if message then head.front[message] = true end
    i = i - 1
    if i < -SCANNED then
      head.number, head.unknown = 0, true
      break
    end
  end
  heads[list] = head
  return head
end

local waiting = redis.call('ZRANGE', P .. 'waiting:' .. ARGV[1], ARGV[3], ARGV[3] + ARGV[4] - 1)
local lost = {}
for _, id in ipairs(waiting) do
  local job = redis.call('HMGET', job_key(id), 'woken_at', 'message', 'queue', 'priority')
  if not job[1] then
    redis.call('ZREM', P .. 'waiting:' .. ARGV[1], id)  -- its record has expired
  elseif tonumber(job[1]) + ARGV[2] <= tonumber(now) and not redis.call('ZSCORE', P .. 'delayed', id) then
    local head = head_of(list_of(job[3], tonumber(job[4])))
    local number, mark = string.match(job[2], '(%d+)(f?)$')
    local there
    if mark == 'f' then there = head.unknown or head.front[job[2]] else there = tonumber(number) >= head.number end
    if not there then lost[#lost + 1] = id end
  end
end
for i = #lost, 1, -1 do  -- the oldest comes to stand first
  wake_job(lost[i], true)
  woken[#woken + 1] = lost[i]
end
return {woken, #waiting}
"""
)

# Take a due callback for one try, or hear why not. ARGV callback id, lock_s
TAKE_CALLBACK = (
    _TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
local c = redis.call('HMGET', key, 'status', 'due')
if c[1] ~= 'pending' or tonumber(c[2]) > tonumber(now) then return false end
redis.call('HSET', key, 'due', string.format('%.6f', now + ARGV[2]))
redis.call('ZADD', P .. 'callbacks:due', now + ARGV[2], ARGV[1])
redis.call('HINCRBY', key, 'tries', 1)
return redis.call('HGETALL', key)
"""
)

# What came of a try. ARGV callback id, log entry, status, delay_s until the next try
SETTLE_CALLBACK = (
    _TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
if redis.call('HGET', key, 'status') ~= 'pending' then return 0 end
local log = cjson.decode(redis.call('HGET', key, 'log') or '[]')
log[#log + 1] = cjson.decode(ARGV[2])
redis.call('HSET', key, 'log', cjson.encode(log), 'status', ARGV[3])
if ARGV[3] == 'pending' then
  redis.call('HSET', key, 'due', string.format('%.6f', now + ARGV[4]))
  redis.call('ZADD', P .. 'callbacks:due', now + ARGV[4], ARGV[1])
else
  redis.call('ZREM', P .. 'callbacks:due', ARGV[1])
  if ARGV[3] == 'gone' then redis.call('HSET', P .. 'callbacks:disabled', redis.call('HGET', key, 'url'), now) end
end
return 1
"""
)

# A callback that was taken and not tried. ARGV callback id, delay_s
PUT_BACK_CALLBACK = (
    _TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
if redis.call('HGET', key, 'status') ~= 'pending' then return 0 end
redis.call('HINCRBY', key, 'tries', -1)
redis.call('HSET', key, 'due', string.format('%.6f', now + ARGV[2]))
redis.call('ZADD', P .. 'callbacks:due', now + ARGV[2], ARGV[1])
return 1
"""
)

# Wake every callback whose try is due; also those whose message or deliverer was lost. ARGV most
WAKE_CALLBACKS = (
    _PRELUDE
    + """
local due = redis.call('ZRANGEBYSCORE', P .. 'callbacks:due', '-inf', now, 'LIMIT', 0, ARGV[1])
local woken = 0
for _, cid in ipairs(due) do
  if redis.call('EXISTS', P .. 'callback:' .. cid) == 0 then
    redis.call('ZREM', P .. 'callbacks:due', cid)
    redis.call('ZREM', P .. 'callbacks', cid)
  else
    -- Not again before the deliverer had time to take it.
    redis.call('ZADD', P .. 'callbacks:due', now + 5, cid)
    wake(CALLBACK, cid, CALLBACK_QUEUE, 0, false)
    woken = woken + 1
  end
end
return woken
"""
)

# Send a callback once more, whatever came of it. ARGV callback id
REPLAY_CALLBACK = (
    _PRELUDE
    + """
local key = P .. 'callback:' .. ARGV[1]
if redis.call('EXISTS', key) == 0 then return 0 end
redis.call('HDEL', P .. 'callbacks:disabled', redis.call('HGET', key, 'url'))
redis.call('HSET', key, 'status', 'pending', 'due', now, 'tries', 0)
redis.call('ZADD', P .. 'callbacks:due', now, ARGV[1])
wake(CALLBACK, ARGV[1], CALLBACK_QUEUE, 0, false)
return 1
"""
)

# Forget ended jobs whose time is over. ARGV most; returns tenant/id of each, also again until their images are gone
EXPIRE = (
    _TIME
    + """
local over = redis.call('ZRANGEBYSCORE', P .. 'expiring', '-inf', now, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(over) do
  local id = string.match(member, '/(.*)$')
  redis.call('DEL', job_key(id), P .. 'events:' .. id, P .. 'checkpoint:' .. id)
  for _, index in ipairs({'jobs', 'jobs:succeeded', 'jobs:failed', 'jobs:cancelled'}) do redis.call('ZREM', P .. index, id) end
end
return over
"""
)
