-- A callback that was taken and not tried: due again after delay_s, and the try does not count.
--
-- Invariant: as in settle_callback.lua, only the holder of the newest try puts back, and the first write takes no memory.
-- uses: clock

local id, tries, delay_s = unpack(ARGV)

local key = keys.callback(id)
local callback = redis.call('HMGET', key, 'status', 'tries')
if callback[1] ~= 'pending' or callback[2] ~= tries then return 0 end
redis.call('ZREM', keys.due_callbacks(), id)
redis.call('HINCRBY', key, 'tries', -1)
redis.call('HSET', key, 'due', clock.after(delay_s))
redis.call('ZADD', keys.due_callbacks(), clock.after(delay_s), id)
return 1
