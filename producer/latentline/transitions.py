"""The transitions of a job record as Lua scripts: each is atomic, and on the server's clock.

Fields of a record's hash beyond those of ``JobRecord``: ``token`` (fencing token of the newest claim), ``lease_until``
and ``deadline_at`` (Unix seconds), ``created_us`` (score in the indexes), ``waiting_score``, ``model``.
The scripts compute keys, so they are for one Redis server (with replicas), not for Redis Cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from . import routing
from .operations import Op

MAX_EVENTS = 1000  # kept per job, about; a job of 150 steps makes some 160

# Microseconds between the Unix epoch and 2020: a waiting score is the priority step in units of 1e15 us (31 years)
# plus the time since then, and so stays below 2**53, where sorted sets are exact.
_WAITING_EPOCH_US = 1577836800 * 10**6

_PRELUDE = f"""
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = now_us / 1000000
local function text(number, decimals) return string.format('%.' .. (decimals or 0) .. 'f', number) end
local function job_key(id) return '{routing.job_key("")}' .. id end
local function events_key(id) return '{routing.events_key("")}' .. id end
local function index_key(status) return '{routing.index_key("")}' .. status end
local function waiting_key(model) return '{routing.waiting_key("")}' .. model end
local ALL = '{routing.index_key()}'

local function event(id, kind, data)
  redis.call('XADD', events_key(id), 'MAXLEN', '~', '{MAX_EVENTS}', '*', 'type', kind, 'at', text(now, 6), 'data', data)
end

-- The hash as a flat list, and the place in the queue (false when not queued).
local function snapshot(id)
  local job = job_key(id)
  return {{redis.call('HGETALL', job), redis.call('ZRANK', waiting_key(redis.call('HGET', job, 'model') or ''), id)}}
end

local function move(id, status)
  local job = job_key(id)
  local old = redis.call('HMGET', job, 'status', 'created_us', 'model', 'waiting_score')
  redis.call('ZREM', index_key(old[1]), id)
  redis.call('ZADD', index_key(status), old[2], id)
  redis.call('HSET', job, 'status', status)
  if status == 'queued' then redis.call('ZADD', waiting_key(old[3]), old[4], id)
  else redis.call('ZREM', waiting_key(old[3]), id) end
end

local function finish(id, status, data, retention_s)
  local job = job_key(id)
  move(id, status)
  redis.call('HDEL', job, 'phase', 'lease_until')
  redis.call('HSET', job, 'finished_at', text(now, 6))
  event(id, 'job.' .. status, data)
  redis.call('EXPIRE', job, retention_s)
  redis.call('EXPIRE', events_key(id), retention_s)
  -- Two of the oldest for each new one: entries of expired records go even when nobody lists.
  for _, old in ipairs(redis.call('ZRANGE', index_key(status), 0, 1)) do
    if redis.call('EXISTS', job_key(old)) == 0 then
      redis.call('ZREM', index_key(status), old)
      redis.call('ZREM', ALL, old)
    end
  end
end
"""


class Script:
    """One Lua script, run by its digest; loaded when the server does not know it (yet, or since a restart)."""

    def __init__(self, body: str) -> None:
        self.text = _PRELUDE + body
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def one(self, *args: Any) -> Op[Any]:
        answers = yield from self.many([args])
        return answers[0]

    def many(self, calls: Sequence[Sequence[Any]]) -> Op[list[Any]]:
        """Run once per argument list, in one round trip. Scripts may be repeated after NOSCRIPT: write them so."""

        def execute(redis: Any) -> Any:
            pipe = redis.pipeline(transaction=False)
            for args in calls:
                pipe.evalsha(self.sha, 0, *args)
            return pipe.execute(raise_on_error=False)

        answers: list[Any] = yield execute
        if any(isinstance(answer, NoScriptError) for answer in answers):
            yield lambda redis: redis.script_load(self.text)
            answers = yield execute
        for answer in answers:
            if isinstance(answer, Exception):
                yield _raiser(answer)
        return answers


def _raiser(error: Exception) -> Any:
    def call(_redis: Any) -> Any:  # raised by the driver, which knows which of Redis's errors are ours
        raise error

    return call


# id, request, model, num_steps, deadline_s ('' for none), priority step (0..3), queue list, wake-up,
# idempotency key ('' for none), fingerprint, retention_s -> snapshot, or 'conflict'
SUBMIT = Script(f"""
local id, request, model, num_steps, deadline_s, step, list, wake_up, key, fingerprint, retention_s = unpack(ARGV)
if key ~= '' then
  local known = redis.call('GET', key)
  if known then
    local known_id, known_fingerprint = string.match(known, '^(%S+) (%S+)$')
    if redis.call('EXISTS', job_key(known_id)) == 1 then
      if known_fingerprint ~= fingerprint then return 'conflict' end
      return snapshot(known_id)
    end
  end
  redis.call('SET', key, id .. ' ' .. fingerprint, 'EX', retention_s)
end
if redis.call('EXISTS', job_key(id)) == 1 then return snapshot(id) end
local created_us = text(now_us)
redis.call('HSET', job_key(id), 'id', id, 'request', request, 'model', model, 'num_steps', num_steps, 'status', 'queued',
  'created_at', text(now, 6), 'created_us', created_us, 'token', '0', 'attempt', '0', 'step', '0',
  'waiting_score', text(tonumber(step) * 1e15 + now_us - {_WAITING_EPOCH_US}))
if deadline_s ~= '' then redis.call('HSET', job_key(id), 'deadline_at', text(now + tonumber(deadline_s), 6)) end
redis.call('ZADD', ALL, created_us, id)
move(id, 'queued')
event(id, 'job.queued', '{{}}')
redis.call('LPUSH', list, wake_up)
return snapshot(id)
""")

# id -> snapshot, or nil
GET = Script("""
if redis.call('EXISTS', job_key(ARGV[1])) == 0 then return false end
return snapshot(ARGV[1])
""")

# index, score and id after which to go on ('+inf' and '' to start), limit -> snapshots, score and id to go on after
LIST = Script("""
local index, score, after, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local found, visited, offset = {}, 0, 0
while #found < limit and visited < 2000 do  -- bounded: a server must not stand still over old entries
  local page = redis.call('ZREVRANGEBYSCORE', index, score, '-inf', 'WITHSCORES', 'LIMIT', offset, 200)
  if #page == 0 then return {found} end
  for i = 1, #page, 2 do
    local id, at = page[i], page[i + 1]
    -- Equal scores come in reverse order of the ids.
    if after == '' or tonumber(at) < tonumber(score) or id < after then
      score, after, offset, visited = at, id, 0, visited + 1
      if redis.call('EXISTS', job_key(id)) == 1 then
        found[#found + 1] = snapshot(id)
        if #found == limit then break end
      else
        redis.call('ZREM', ALL, id)
        for _, status in ipairs({'queued', 'running', 'succeeded', 'failed', 'cancelled'}) do redis.call('ZREM', index_key(status), id) end
      end
    else
      offset = offset + 1
    end
  end
end
return {found, score, after}
""")

# id, retention_s -> snapshot, or nil
CANCEL = Script("""
local id = ARGV[1]
local status, lease = unpack(redis.call('HMGET', job_key(id), 'status', 'lease_until'))
if not status then return false end
-- A running job whose lease has lapsed has nobody to hear the request.
if status == 'queued' or (status == 'running' and tonumber(lease) < now) then finish(id, 'cancelled', '{}', ARGV[2])
elseif status == 'running' then redis.call('HSET', job_key(id), 'cancel_requested', '1') end
return snapshot(id)
""")

# id, worker, worker as JSON, lease_s, error (JSON) for a job past its deadline, retention_s -> {token, snapshot}, or nil
CLAIM = Script("""
local id, worker, worker_json, lease_s, too_late, retention_s = unpack(ARGV)
local job = job_key(id)
local status, lease, cancel, deadline = unpack(redis.call('HMGET', job, 'status', 'lease_until', 'cancel_requested', 'deadline_at'))
if status ~= 'queued' and status ~= 'running' then return false end
if status == 'running' and tonumber(lease) >= now then return false end
if cancel then
  finish(id, 'cancelled', '{}', retention_s)
  return false
end
if deadline and tonumber(deadline) < now then
  redis.call('HSET', job, 'error', too_late)
  finish(id, 'failed', '{"error":' .. too_late .. '}', retention_s)
  return false
end
move(id, 'running')
local attempt = redis.call('HINCRBY', job, 'attempt', 1)
local token = redis.call('HINCRBY', job, 'token', 1)
redis.call('HSETNX', job, 'started_at', text(now, 6))
redis.call('HSET', job, 'worker', worker, 'phase', 'encoding', 'step', '0', 'lease_until', text(now + tonumber(lease_s), 6))
event(id, 'job.running', '{"worker":' .. worker_json .. ',"attempt":' .. text(attempt) .. '}')
return {token, snapshot(id)}
""")

# id, token, phase, step, lease_s, batch_jobs -> a verdict
BEAT = Script("""
local id, token, phase, step, lease_s, batch_jobs = unpack(ARGV)
local job = job_key(id)
local status, newest, old_phase, old_step, num_steps, cancel, deadline =
  unpack(redis.call('HMGET', job, 'status', 'token', 'phase', 'step', 'num_steps', 'cancel_requested', 'deadline_at'))
if status ~= 'running' or newest ~= token then return 'stale' end
redis.call('HSET', job, 'lease_until', text(now + tonumber(lease_s), 6))
if phase ~= old_phase or step ~= old_step then
  redis.call('HSET', job, 'phase', phase, 'step', step)
  event(id, 'job.progress', '{"phase":"' .. phase .. '","step":' .. step .. ',"num_steps":' .. num_steps .. ',"batch_jobs":' .. batch_jobs .. '}')
end
if cancel then return 'cancelled' end
if deadline and tonumber(deadline) < now then return 'expired' end
return 'go'
""")

# id, token, queue list, wake-up, retention_s -> 1, or 0 when the token is stale
RELEASE = Script("""
local id, token, list, wake_up, retention_s = unpack(ARGV)
local job = job_key(id)
local status, newest, cancel = unpack(redis.call('HMGET', job, 'status', 'token', 'cancel_requested'))
if status ~= 'running' or newest ~= token then return 0 end
if cancel then
  finish(id, 'cancelled', '{}', retention_s)
  return 1
end
move(id, 'queued')
redis.call('HDEL', job, 'phase', 'lease_until', 'worker')
redis.call('HSET', job, 'step', '0')
event(id, 'job.queued', '{}')
redis.call('RPUSH', list, wake_up)  -- the end that workers take from: it has waited its turn once
return 1
""")

# id, token, status, images, error ('' for none), timings (all JSON), event data, retention_s -> snapshot, or nil when stale
SETTLE = Script("""
local id, token, status, images, failure, timings, data, retention_s = unpack(ARGV)
local job = job_key(id)
local old, newest, num_steps = unpack(redis.call('HMGET', job, 'status', 'token', 'num_steps'))
if old ~= 'running' or newest ~= token then return false end
redis.call('HSET', job, 'images', images, 'timings', timings)
if failure ~= '' then redis.call('HSET', job, 'error', failure) end
if status == 'succeeded' then redis.call('HSET', job, 'step', num_steps) end
finish(id, status, data, retention_s)
return snapshot(id)
""")

# name -> nothing; workers that have been silent for an hour are forgotten
WORKER_BEAT = Script(f"""
redis.call('ZADD', '{routing.workers_key()}', text(now, 6), ARGV[1])
redis.call('ZREMRANGEBYSCORE', '{routing.workers_key()}', '-inf', text(now - 3600, 6))
""")

# -> the server's clock, then name and time of the last beat of each worker
WORKERS = Script(f"""
return {{text(now, 6), redis.call('ZRANGE', '{routing.workers_key()}', 0, -1, 'WITHSCORES')}}
""")
