"""What the scripts share."""

from __future__ import annotations

from latentline import routing

# Filled in by Lua; none of the marks needs escaping in JSON. The priority stands unquoted in the message.
_TEMPLATE = routing.wake_up("@task@", "@argument@", "@queue@", "@priority@", "@message@").replace('"@priority@"', "@priority@")


CALLBACK_KEPT_S = 7 * 86400  # at least: a callback's tries go on for three days and more, however short the job's own retention
CALLBACK_GRACE_S = 30  # a callback whose message was written this long ago and that nobody has taken is woken again

TIME = (
    f"local CALLBACK_GRACE_S, CALLBACK_KEPT_S = {CALLBACK_GRACE_S}, {CALLBACK_KEPT_S}"
    + """
local t = redis.call('TIME')
local now = string.format('%d.%06d', t[1], t[2])
local P = 'latentline:'
local function later(seconds) return string.format('%.6f', now + seconds) end
-- A broker at its memory bound refuses a script's first write if that takes memory, and none that follows a write which
-- takes none. What ends work or keeps it in its owner's hands does such a write first: it has to get through.
local function in_any_case() redis.call('ZREM', P .. 'leases', '') end
local function job_key(id) return P .. 'job:' .. id end
local function event(id, kind, data)
  data.seq = redis.call('HINCRBY', job_key(id), 'seq', 1)
  redis.call('XADD', P .. 'events:' .. id, 'MAXLEN', '~', 1000, '*', 'type', kind, 'at', now, 'data', cjson.encode(data))
  return data.seq
end
"""
)


# What the transitions share.
PRELUDE = (
    TIME
    + f"""
local TEMPLATE = [==[{_TEMPLATE}]==]
local GENERATE, CALLBACK, CALLBACK_QUEUE = '{routing.GENERATE_TASK}', '{routing.CALLBACK_TASK}', '{routing.CALLBACK_QUEUE}'
local SEPARATOR, NUM_SHARDS, STEPS = '\\6\\22', {routing.NUM_SHARDS}, {{ {", ".join(map(str, routing.PRIORITY_STEPS))} }}
"""
    + """
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
  redis.call('EXPIRE', key, math.max(retention, CALLBACK_KEPT_S))
  redis.call('ZADD', P .. 'callbacks', now, cid)
  redis.call('ZADD', P .. 'callbacks:due', later(CALLBACK_GRACE_S), cid)  -- its message is on its way
  wake(CALLBACK, cid, CALLBACK_QUEUE, 0, false)
end

local function leave(id, model)
  redis.call('ZREM', P .. 'waiting:' .. model, id)
  redis.call('ZREM', P .. 'jobs:queued', id)
  redis.call('ZREM', P .. 'jobs:running', id)
  redis.call('ZREM', P .. 'leases', id)
  redis.call('ZREM', P .. 'delayed', id)
end

-- With its request: the dead letter may outlive the record.
local function bury(id, dead)
  dead.at, dead.id, dead.kind, dead.job_id, dead.request = now, id, 'job', id, redis.call('HGET', job_key(id), 'request')
  redis.call('HSET', P .. 'dead', id, cjson.encode(dead))
  redis.call('ZADD', P .. 'dead:at', now, id)
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
  if redis.call('HINCRBY', P .. 'open:' .. job[1], job[3], -1) <= 0 then
    redis.call('HDEL', P .. 'open:' .. job[1], job[3])
    redis.call('HDEL', P .. 'shards:' .. job[1], job[3])
  end
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
