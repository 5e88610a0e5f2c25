-- What a worker has to say about a job that it runs, such as a prompt that was cut. finish() in lib/jobs.lua puts it into
-- the event.
--
-- Invariant: only the holder of the newest token says it, and a later attempt replaces it.
--
-- Returns 1, or 0 for a stale token.

local id, token, warnings = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'token')
if job[1] ~= 'running' or job[2] ~= token then return 0 end
redis.call('HSET', keys.job(id), 'warnings', warnings)
return 1
