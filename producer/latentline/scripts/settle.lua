-- The end of a running job, as its worker reports it.
--
-- Invariants:
-- * Only the holder of the newest token settles, and finish() raises the token: a second report changes nothing.
-- * A job that succeeded has done all its steps.
--
-- `account` is what the worker tells of this attempt, for the job's timeline; it may be empty.
--
-- Returns the record, or false for a stale token.
-- uses: jobs, memory_bound

local id, token, status, images, err, timings, retention_s, account, pixels = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'status', 'token', 'num_steps')
if job[1] ~= 'running' or job[2] ~= token then return false end
memory_bound.pass(keys.leases())
local found = { 'images', images, 'timings', timings }
-- Digests of the pixels stand beside the images: readers of version 0.1.0 refuse a field of an image that they do not know.
if pixels ~= '' then table.insert(found, 'pixels') table.insert(found, pixels) end
if status == 'succeeded' then table.insert(found, 'step') table.insert(found, job[3]) end
redis.call('HSET', key, unpack(found))
jobs.finish(id, status, err ~= '' and cjson.decode(err) or nil, retention_s, account)
return redis.call('HGETALL', key)
