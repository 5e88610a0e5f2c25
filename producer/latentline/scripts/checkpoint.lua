-- Store what another worker needs to continue a job.
--
-- Invariants:
-- * Only the holder of the newest token writes, so a stalled worker cannot replace a newer checkpoint.
-- * `checkpoint_step` and the checkpoint are of the same step.
-- * At maxmemory no checkpoint is stored, which is not an error: the job continues without one.
--
-- Returns 1 when it is kept, else 0.

local id, token, step, data, ttl_s = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'token')
if job[1] ~= 'running' or job[2] ~= token then return 0 end
local kept = redis.pcall('SET', keys.checkpoint(id), data, 'EX', ttl_s)
if kept.err then return string.find(kept.err, 'OOM', 1, true) and 0 or kept end
redis.call('HSET', keys.job(id), 'checkpoint_step', step)
return 1
