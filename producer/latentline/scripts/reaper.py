"""What is done for jobs that belong to no worker."""

from __future__ import annotations

from .prelude import PRELUDE, TIME

# A worker is lost: its job goes on elsewhere, or fails when it was alone on too many. ARGV id, max_crashes_alone, retention_s
RECLAIM = (
    PRELUDE
    + """
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'status', 'lease_until', 'cancel_requested', 'alone', 'step', 'furthest')
if job[1] ~= 'running' then
  redis.call('ZREM', P .. 'leases', id)
  if not job[1] then redis.call('ZREM', P .. 'jobs:running', id) end  -- its record has expired
  return 0
end
if tonumber(job[2] or 0) > tonumber(now) then return 0 end
in_any_case()
-- What kills its workers does so at the same step each time; what was further than ever when its worker was lost does not.
local further = tonumber(job[5]) > tonumber(job[6] or 0)
if further then redis.call('HSET', key, 'furthest', job[5], 'crashes_alone', 0) end
local crashes = redis.call('HINCRBY', key, 'crashes', further and 0 or 1)
local alone = redis.call('HINCRBY', key, 'crashes_alone', (not further and job[4] == '1') and 1 or 0)
if job[3] == '1' then
  finish(id, 'cancelled', nil, ARGV[3])
elseif alone >= tonumber(ARGV[2]) then
  local error = {code = 'worker_lost', message = 'workers that ran this job and nothing else were lost ' .. alone .. ' times'}
  bury(id, {code = error.code, reason = error.message, crashes = crashes})
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
    PRELUDE
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


# A worker is alive and serves a model. ARGV name, model id, model, forgotten_s
ANNOUNCE = (
    TIME
    + """
in_any_case()
redis.call('ZADD', P .. 'workers', now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', P .. 'workers', '-inf', now - ARGV[4])
redis.call('HSET', P .. 'models', ARGV[2], ARGV[3])
return 1
"""
)


# Keep what nobody can read. ARGV id, dead letter
BURY = (
    TIME
    + """
local dead = '{"at": "' .. now .. '", ' .. string.sub(ARGV[2], 2)  -- not decoded: what nobody can read, Lua's JSON cannot either
redis.call('ZREM', P .. 'dead:at', '')  -- as in_any_case, for a role that knows no leases
if redis.call('HSETNX', P .. 'dead', ARGV[1], dead) == 1 then redis.call('ZADD', P .. 'dead:at', now, ARGV[1]) end
return 1
"""
)


# Forget ended jobs whose time is over, and what else has had its time. Returns tenant/id of each; the caller deletes their
# images and says so, or they come again after a while. ARGV most, again_s, retention_s, dead_kept_s, dead_most
EXPIRE = (
    TIME
    + """
local over = redis.call('ZRANGEBYSCORE', P .. 'expiring', '-inf', now, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(over) do
  local id = string.match(member, '/(.*)$')
  redis.call('DEL', job_key(id), P .. 'events:' .. id, P .. 'checkpoint:' .. id)
  for _, index in ipairs({'jobs', 'jobs:succeeded', 'jobs:failed', 'jobs:cancelled'}) do redis.call('ZREM', P .. index, id) end
  redis.call('ZADD', P .. 'expiring', later(ARGV[2]), member)
end
redis.call('ZREMRANGEBYSCORE', P .. 'callbacks', '-inf', now - math.max(ARGV[3], CALLBACK_KEPT_S))  -- the callbacks themselves expire
local dead = redis.call('ZRANGEBYSCORE', P .. 'dead:at', '-inf', now - ARGV[4], 'LIMIT', 0, ARGV[1])
local many = redis.call('ZCARD', P .. 'dead:at') - ARGV[5]
if #dead == 0 and many > 0 then dead = redis.call('ZRANGE', P .. 'dead:at', 0, math.min(many, tonumber(ARGV[1])) - 1) end
for _, id in ipairs(dead) do
  redis.call('ZREM', P .. 'dead:at', id)
  redis.call('HDEL', P .. 'dead', id)
end
return over
"""
)
