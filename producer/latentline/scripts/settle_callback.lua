-- What came of one try of a callback.
--
-- Invariants:
-- * Only the deliverer that made the newest try settles it.
-- * A callback that waits for another try is kept until long after it.
-- * The first write takes no memory, so the rest gets through on a broker at its memory bound.
--
-- Returns 1, or 0 when another deliverer has taken it meanwhile.
-- uses: clock

local id, tries, entry, status, delay_s = unpack(ARGV)

local key = keys.callback(id)
local callback = redis.call('HMGET', key, 'status', 'tries', 'log')
if callback[1] ~= 'pending' or callback[2] ~= tries then return 0 end
local log = cjson.decode(callback[3] or '[]')
log[#log + 1] = cjson.decode(entry)
redis.call('ZREM', keys.due_callbacks(), id)
redis.call('HSET', key, 'log', cjson.encode(log), 'status', status)
if status == 'pending' then
  redis.call('HSET', key, 'due', clock.after(delay_s))
  redis.call('ZADD', keys.due_callbacks(), clock.after(delay_s), id)
  redis.call('EXPIRE', key, const.CALLBACK_KEPT_S, 'GT')
elseif status == 'gone' then
  redis.call('HSET', keys.disabled_receivers(), redis.call('HGET', key, 'url'), clock.now)
end
return 1
