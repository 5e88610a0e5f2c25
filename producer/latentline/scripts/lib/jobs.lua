-- The state changes that several scripts share. The state machine is drawn in docs/job-states.md.
--
-- Invariants:
-- * finish() is the only way into a terminal status. Its callers have checked that the job is not terminal yet, so there is
--   one terminal event per job.
-- * Every move out of `running` raises the token, so the previous holder can no longer change the job.
-- * A job is in the index of its status and in no other, and in `waiting` exactly while it is queued.
-- * finish() gives the record and its idempotency key the same time to live.
-- * A tenant's cost in `tenants` and its job in `open` are taken off once, in finish().
-- uses: clock, events, outbox, wakeups

local jobs = {}

-- Take the job out of the index of its status and of all that is kept for jobs that wait or run.
function jobs.leave(id, model)
  redis.call('ZREM', keys.waiting(model), id)
  redis.call('ZREM', keys.index('queued'), id)
  redis.call('ZREM', keys.index('running'), id)
  redis.call('ZREM', keys.leases(), id)
  redis.call('ZREM', keys.delayed(), id)
end

-- Keep a dead letter. It holds the request, since it may outlive the record.
function jobs.bury(id, letter)
  letter.at, letter.id, letter.kind, letter.job_id = clock.now, id, 'job', id
  letter.request = redis.call('HGET', keys.job(id), 'request')
  redis.call('HSET', keys.dead(), id, cjson.encode(letter))
  redis.call('ZADD', keys.dead_times(), clock.now, id)
end

-- End the job. `err` ({code, message}) or nil; `account` as in lib/events.lua.
function jobs.finish(id, status, err, retention_s, account)
  local key = keys.job(id)
  local job = redis.call('HMGET', key, 'model', 'score', 'tenant', 'cost', 'idempotency_key', 'warnings')
  local model, score, tenant, cost, idempotency_key, warnings = job[1], job[2], job[3], job[4], job[5], job[6]
  jobs.leave(id, model)
  redis.call('ZADD', keys.index(status), score, id)
  redis.call('HDEL', key, 'phase', 'lease_until')
  redis.call('HSET', key, 'status', status, 'finished_at', clock.now)
  redis.call('HINCRBY', key, 'token', 1)
  local data = {status = status}
  if err then
    redis.call('HSET', key, 'error', cjson.encode(err))
    data.error = err
  end
  if warnings then data.warnings = cjson.decode(warnings) end
  if redis.call('HINCRBY', keys.tenants(), tenant, -cost) <= 0 then redis.call('HDEL', keys.tenants(), tenant) end
  if redis.call('HINCRBY', keys.open(model), tenant, -1) <= 0 then
    redis.call('HDEL', keys.open(model), tenant)
    redis.call('HDEL', keys.shards(model), tenant)
  end
  outbox.write(id, 'job.' .. status, events.add(id, 'job.' .. status, data, account), retention_s)
  redis.call('DEL', keys.checkpoint(id), keys.preview(id))
  redis.call('ZREM', keys.deadlines(), id)
  if idempotency_key then
    local idempotency = keys.idempotency(tenant, idempotency_key)
    if redis.call('HGET', idempotency, 'id') == id then redis.call('EXPIRE', idempotency, retention_s) end
  end
  redis.call('ZADD', keys.expiring(), clock.after(retention_s), tenant .. '/' .. id)
  redis.call('EXPIRE', key, retention_s)
  redis.call('EXPIRE', keys.events(id), retention_s)
end

-- Fail a queued job whose deadline has passed; whether it was one.
function jobs.end_if_overdue(id, retention_s)
  local job = redis.call('HMGET', keys.job(id), 'status', 'deadline_at')
  if job[1] ~= 'queued' or not clock.reached(job[2]) then return false end
  local err = {code = 'deadline_exceeded', message = 'the deadline passed before the job started'}
  jobs.finish(id, 'failed', err, retention_s)
  return true
end

-- From running back to queued: at once, at the front or the end of its list, or after `delay_s`. `reason` says why in the
-- event: 'lost', 'handed_over' or 'error'; `account` as in lib/events.lua.
function jobs.requeue(id, delay_s, front, reason, account)
  local key = keys.job(id)
  local job = redis.call('HMGET', key, 'model', 'score', 'order', 'checkpoint_step', 'deadline_at')
  local model, score, order, step, deadline_at = job[1], job[2], job[3], job[4] or 0, job[5]
  jobs.leave(id, model)
  redis.call('HINCRBY', key, 'token', 1)
  redis.call('HSET', key, 'status', 'queued', 'step', step)
  redis.call('HDEL', key, 'phase', 'worker', 'lease_until', 'started_at')
  redis.call('ZADD', keys.index('queued'), score, id)
  redis.call('ZADD', keys.waiting(model), order, id)
  -- While the job ran, end_overdue.lua may have postponed the next look at it until after its deadline.
  if deadline_at then redis.call('ZADD', keys.deadlines(), deadline_at, id) end
  events.add(id, 'job.queued', {status = 'queued', step = tonumber(step), delay_s = delay_s, reason = reason}, account)
  if delay_s > 0 then
    redis.call('ZADD', keys.delayed(), clock.after(delay_s), id)
    redis.call('HSET', key, 'woken_at', clock.after(delay_s))
  else
    wakeups.job(id, front)
  end
end
