-- One job as a reader sees it; it changes nothing.
--
-- Returns {now, the record, its queue position or nil}. The record is empty where there is none.
-- uses: clock

local id = unpack(ARGV)

local record = redis.call('HGETALL', keys.job(id))
local job = redis.call('HMGET', keys.job(id), 'status', 'model')
local position = job[1] == 'queued' and redis.call('ZRANK', keys.waiting(job[2]), id)
return {clock.now, record, position}
