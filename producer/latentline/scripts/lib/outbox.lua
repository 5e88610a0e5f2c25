-- The outbox: callbacks that a transition promises.
--
-- Invariants:
-- * A callback is written in the same script as the event that it reports, so neither exists without the other.
-- * Its id is a function of the job and the event (and of the attempt, for job.running, which may come several times), so
--   that a transition never writes two.
-- uses: clock, wakeups

local outbox = {}

-- Write the callback of an event if the job asked for that kind.
function outbox.write(id, kind, seq, retention_s)
  local job = redis.call('HMGET', keys.job(id), 'callback_url', 'callback_events', 'attempt')
  if not job[1] or not string.find(job[2], '"' .. kind .. '"', 1, true) then return end
  local name = string.sub(kind, #'job.' + 1)
  local callback_id = 'msg_' .. id .. '_' .. name .. (name == 'running' and '_' .. job[3] or '')
  local key = keys.callback(callback_id)
  if redis.call('EXISTS', key) == 1 then return end
  redis.call('HSET', key, 'id', callback_id, 'job_id', id, 'type', kind, 'seq', seq, 'url', job[1], 'at', clock.now,
    'status', 'pending', 'tries', 0, 'due', clock.now, 'record', cjson.encode(redis.call('HGETALL', keys.job(id))))
  redis.call('EXPIRE', key, math.max(retention_s, const.CALLBACK_KEPT_S))
  redis.call('ZADD', keys.callbacks(), clock.now, callback_id)
  redis.call('ZADD', keys.due_callbacks(), clock.after(const.CALLBACK_GRACE_S), callback_id) -- its message is on its way
  wakeups.callback(callback_id)
end
