-- Give a due callback to one deliverer for one try.
--
-- Invariant: until lock_s is over no other deliverer takes it. `tries` numbers the try; only its holder may settle it.
--
-- Returns the callback, or false when it has ended, is not due yet, or another deliverer has it.
-- uses: clock

local id, lock_s = unpack(ARGV)

local key = keys.callback(id)
local callback = redis.call('HMGET', key, 'status', 'due')
if callback[1] ~= 'pending' or not clock.reached(callback[2]) then return false end
redis.call('HSET', key, 'due', clock.after(lock_s))
redis.call('ZADD', keys.due_callbacks(), clock.after(lock_s), id)
redis.call('HINCRBY', key, 'tries', 1)
return redis.call('HGETALL', key)
