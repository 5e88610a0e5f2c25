-- Give a queued job to one worker, under a lease and a new fencing token.
--
-- Invariants:
-- * A job is claimed only from `queued`. The reaper queues jobs whose lease has run out again, under a new message; it waits
--   where all leases have run out because the broker was unreachable.
-- * Each claim raises the token. Only the newest token may settle, so a second message or a stalled worker changes nothing.
-- * A claim repeated under the same claim id, because its answer was lost, is answered again and changes nothing.
-- * A broker at its memory bound gives out no job, since it might be unable to take what comes of it: the first write is one
--   that takes memory.
-- * A job of a higher level than the worker's is left alone: its own wake-up lies in a queue that this worker does not read.
--
-- Returns the record, or why there is nothing to do: 'unknown', 'newer', 'taken', 'done' or 'delayed'.
-- uses: clock, events, jobs, outbox

local id, worker, lease_s, retention_s, alone, claim_id, level = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'status', 'claim', 'score', 'model', 'checkpoint_step', 'level')
local status, claimed_by, score, model, step = job[1], job[2], job[3], job[4], job[5] or 0
if not status then return 'unknown' end
if tonumber(job[6] or 1) > tonumber(level) then return 'newer' end
if status == 'running' then return claimed_by == claim_id and redis.call('HGETALL', key) or 'taken' end
if status ~= 'queued' then return 'done' end
local due = redis.call('ZSCORE', keys.delayed(), id)
if due and not clock.reached(due) then return 'delayed' end
if jobs.end_if_overdue(id, retention_s) then return 'done' end

redis.call('HINCRBY', key, 'attempt', 1)
redis.call('HINCRBY', key, 'token', 1)
jobs.leave(id, model)
redis.call('ZADD', keys.index('running'), score, id)
redis.call('ZADD', keys.leases(), clock.after(lease_s), id)
redis.call('HSET', key, 'status', 'running', 'phase', 'encoding', 'step', step, 'worker', worker, 'started_at', clock.now,
  'lease_until', clock.after(lease_s), 'alone', alone, 'claim', claim_id)
local seq = events.add(id, 'job.running', {status = 'running', worker = worker, step = tonumber(step)})
outbox.write(id, 'job.running', seq, retention_s)
return redis.call('HGETALL', key)
