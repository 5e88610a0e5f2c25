-- Send a callback once more, whatever came of it, also to a receiver that was switched off.
--
-- Returns 1, or 0 for an unknown callback.
-- uses: clock, wakeups

local id = unpack(ARGV)

local key = keys.callback(id)
if redis.call('EXISTS', key) == 0 then return 0 end
redis.call('HDEL', keys.disabled_receivers(), redis.call('HGET', key, 'url'))
redis.call('HSET', key, 'status', 'pending', 'due', clock.now, 'tries', 0)
redis.call('ZADD', keys.due_callbacks(), clock.now, id)
wakeups.callback(id)
return 1
