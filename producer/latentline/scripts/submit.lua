-- Accept a job: record, wake-up, indexes and event in one step.
--
-- Invariants:
-- * The idempotency key is written only when the job is accepted: a refused request may be sent again under the same key.
-- * The key identifies what the client sent (`sent`). Version 0.1.0 writes and compares only `fingerprint`, in which the size
--   is resolved. Both are written, so that a request that is sent again through an API of the other version is recognised.
-- * The wake-up lies in a queue of the job's level, and workers of a lower level do not take from it.
-- * A key whose job has no record any more is free. The key's own time to live is KEY_KEPT_S until finish() in lib/jobs.lua
--   sets it to the record's; workers of version 0.1.0 do not, so the keys of jobs that they end stay for KEY_KEPT_S.
-- * A job with a deadline is in `deadlines` from here until it ends.
-- * A tenant may always have one job, however costly; more only while their sum stays within the cap.
-- * A tenant has at most max_jobs jobs that have not ended.
-- * `traceparent`, of the trace in which the job was submitted, is a field of its own: readers that do not know it leave it out.
-- * All of a tenant's jobs of a model lie in one shard while it has any. A tenant without jobs gets the shard with the fewest
--   tenants, and of those the emptiest.
--
-- Returns {'same' | 'conflict', id of the job that has the key}, {'full', rows of the tenant}, {'busy', jobs of the
-- tenant}, or {'new', the record, its queue position}.
-- uses: clock, events, wakeups

local id, request, num_steps, model, tenant, priority, priority_step, deadline_s, cost, cap, idempotency_key, fingerprint,
  sized_fingerprint, retention_s, callback_url, callback_events, queue_prefix, level, max_jobs, labels, digest,
  sending, traceparent = unpack(ARGV)

local idempotency = keys.idempotency(tenant, idempotency_key)
if idempotency_key ~= '' then
  local kept = redis.call('HMGET', idempotency, 'id', 'fingerprint', 'sent')
  if kept[1] and redis.call('EXISTS', keys.job(kept[1])) == 1 then
    local same
    if kept[3] then same = kept[3] == fingerprint else same = kept[2] == sized_fingerprint end
    return {same and 'same' or 'conflict', kept[1]}
  end
end

local owed = tonumber(redis.call('HGET', keys.tenants(), tenant) or 0)
if tonumber(cap) > 0 and owed > 0 and owed + cost > tonumber(cap) then return {'full', tostring(owed)} end

if tonumber(max_jobs) > 0 then
  -- Counted by model, since that is what all workers keep up; `models` holds every model that was ever served.
  local models, open = redis.call('HGETALL', keys.models()), tonumber(redis.call('HGET', keys.open(model), tenant) or 0)
  for i = 1, #models, 2 do
    if models[i] ~= model then open = open + (redis.call('HGET', keys.open(models[i]), tenant) or 0) end
  end
  if open >= tonumber(max_jobs) then return {'busy', tostring(open)} end
end

if idempotency_key ~= '' then
  redis.call('HSET', idempotency, 'id', id, 'fingerprint', sized_fingerprint, 'sent', fingerprint)
  redis.call('EXPIRE', idempotency, const.KEY_KEPT_S)
end

local function length_of(shard)
  local length = 0
  for _, step in ipairs(const.PRIORITY_STEPS) do
    length = length + redis.call('LLEN', wakeups.list(queue_prefix .. shard, step))
  end
  return length
end

local function emptiest_shard()
  local tenants, fewest = {}, math.huge
  for _, shard in ipairs(redis.call('HVALS', keys.shards(model))) do tenants[shard] = (tenants[shard] or 0) + 1 end
  for shard = 0, const.NUM_SHARDS - 1 do fewest = math.min(fewest, tenants[tostring(shard)] or 0) end
  local least, emptiest = math.huge, nil
  for shard = 0, const.NUM_SHARDS - 1 do
    if (tenants[tostring(shard)] or 0) == fewest then
      if fewest == 0 then return shard end -- a shard without tenants has no jobs: its length need not be looked at
      local length = length_of(shard)
      if length < least then least, emptiest = length, shard end
    end
  end
  return emptiest
end

local shard = redis.call('HGET', keys.shards(model), tenant)
if not shard then
  shard = emptiest_shard()
  redis.call('HSET', keys.shards(model), tenant, shard)
end
redis.call('HINCRBY', keys.open(model), tenant, 1)
redis.call('HINCRBY', keys.tenants(), tenant, cost)

local key = keys.job(id)
local created_at = string.format('%d.%03d', math.floor(clock.ms / 1000), clock.ms % 1000)
-- Sorts first by the priority's list, then by the time of submission.
local order = string.format('%.0f', tonumber(priority_step) * const.PRIORITY_SCORE + redis.call('INCR', keys.messages()))
local trace = traceparent ~= '' and {'traceparent', traceparent} or {} -- in the same command, since traces cost none
redis.call('HSET', key, 'id', id, 'request', request, 'status', 'queued', 'step', 0, 'num_steps', num_steps, 'attempt', 0,
  'token', 0, 'errors', 0, 'crashes', 0, 'crashes_alone', 0, 'model', model, 'tenant', tenant, 'priority', priority,
  'queue', queue_prefix .. shard, 'cost', cost, 'created_at', created_at, 'score', clock.ms, 'order', order, unpack(trace))
if tonumber(level) > 1 then redis.call('HSET', key, 'level', level) end
if labels ~= '' then redis.call('HSET', key, 'labels', labels) end -- for page.lua
if idempotency_key ~= '' then redis.call('HSET', key, 'idempotency_key', idempotency_key) end
if tonumber(deadline_s) > 0 then
  redis.call('HSET', key, 'deadline_at', clock.after(deadline_s), 'retention_s', retention_s)
  redis.call('ZADD', keys.deadlines(), clock.after(deadline_s), id)
end
if digest ~= '' then -- see take_unanswered.lua
  redis.call('HSET', key, 'sending', sending, 'answer', 'awaited')
  redis.call('ZADD', keys.unanswered(digest), clock.ms, id)
  redis.call('EXPIRE', keys.unanswered(digest), const.UNANSWERED_KEPT_S)
end
if callback_url ~= '' then redis.call('HSET', key, 'callback_url', callback_url, 'callback_events', callback_events) end
redis.call('ZADD', keys.index(), clock.ms, id)
redis.call('ZADD', keys.tenant_index(tenant), clock.ms, id)
redis.call('ZADD', keys.index('queued'), clock.ms, id)
redis.call('ZADD', keys.waiting(model), order, id)
events.add(id, 'job.queued', {status = 'queued'})
wakeups.job(id, false)
return {'new', redis.call('HGETALL', key), redis.call('ZRANK', keys.waiting(model), id)}
