"""The life of a callback after the transition that wrote it."""

from __future__ import annotations

from .prelude import PRELUDE, TIME

# Take a due callback for one try, or hear why not. ARGV callback id, lock_s
TAKE_CALLBACK = (
    TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
local c = redis.call('HMGET', key, 'status', 'due')
if c[1] ~= 'pending' or tonumber(c[2]) > tonumber(now) then return false end
redis.call('HSET', key, 'due', later(ARGV[2]))
redis.call('ZADD', P .. 'callbacks:due', later(ARGV[2]), ARGV[1])
redis.call('HINCRBY', key, 'tries', 1)
return redis.call('HGETALL', key)
"""
)


# What came of a try. ARGV callback id, number of the try, log entry, status, delay_s until the next try
SETTLE_CALLBACK = (
    TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
local c = redis.call('HMGET', key, 'status', 'tries', 'log')
if c[1] ~= 'pending' or c[2] ~= ARGV[2] then return 0 end  -- others have taken it meanwhile
local log = cjson.decode(c[3] or '[]')
log[#log + 1] = cjson.decode(ARGV[3])
redis.call('ZREM', P .. 'callbacks:due', ARGV[1])  -- first, so that the rest gets through on a broker without memory
redis.call('HSET', key, 'log', cjson.encode(log), 'status', ARGV[4])
if ARGV[4] == 'pending' then
  redis.call('HSET', key, 'due', later(ARGV[5]))
  redis.call('ZADD', P .. 'callbacks:due', later(ARGV[5]), ARGV[1])
  redis.call('EXPIRE', key, CALLBACK_KEPT_S, 'GT')
elseif ARGV[4] == 'gone' then
  redis.call('HSET', P .. 'callbacks:disabled', redis.call('HGET', key, 'url'), now)
end
return 1
"""
)


# A callback that was taken and not tried. ARGV callback id, number of the try, delay_s
PUT_BACK_CALLBACK = (
    TIME
    + """
local key = P .. 'callback:' .. ARGV[1]
local c = redis.call('HMGET', key, 'status', 'tries')
if c[1] ~= 'pending' or c[2] ~= ARGV[2] then return 0 end
redis.call('ZREM', P .. 'callbacks:due', ARGV[1])  -- first, as above
redis.call('HINCRBY', key, 'tries', -1)
redis.call('HSET', key, 'due', later(ARGV[3]))
redis.call('ZADD', P .. 'callbacks:due', later(ARGV[3]), ARGV[1])
return 1
"""
)


# Wake every callback whose try is due; also those whose message or deliverer was lost. ARGV most
WAKE_CALLBACKS = (
    PRELUDE
    + """
if redis.call('LLEN', CALLBACK_QUEUE) > 1000 then return 0 end  -- they have enough to do: a second message helps nobody
local due = redis.call('ZRANGEBYSCORE', P .. 'callbacks:due', '-inf', now, 'LIMIT', 0, ARGV[1])
local woken = 0
for _, cid in ipairs(due) do
  if redis.call('EXISTS', P .. 'callback:' .. cid) == 0 then
    redis.call('ZREM', P .. 'callbacks:due', cid)
    redis.call('ZREM', P .. 'callbacks', cid)
  else
    redis.call('ZADD', P .. 'callbacks:due', later(CALLBACK_GRACE_S), cid)
    wake(CALLBACK, cid, CALLBACK_QUEUE, 0, false)
    woken = woken + 1
  end
end
return woken
"""
)


# Send a callback once more, whatever came of it. ARGV callback id
REPLAY_CALLBACK = (
    PRELUDE
    + """
local key = P .. 'callback:' .. ARGV[1]
if redis.call('EXISTS', key) == 0 then return 0 end
redis.call('HDEL', P .. 'callbacks:disabled', redis.call('HGET', key, 'url'))
redis.call('HSET', key, 'status', 'pending', 'due', now, 'tries', 0)
redis.call('ZADD', P .. 'callbacks:due', now, ARGV[1])
wake(CALLBACK, ARGV[1], CALLBACK_QUEUE, 0, false)
return 1
"""
)
