-- Wake deliverers for callbacks that are due, including those whose message or deliverer was lost.
--
-- Invariant: a callback that is woken is not woken again before CALLBACK_GRACE_S is over.
--
-- Returns how many were woken.
-- uses: clock, wakeups

local most = unpack(ARGV)

local BUSY = 1000 -- messages that wait: the deliverers have enough to do, and second messages would only add to them

if redis.call('LLEN', const.CALLBACK_QUEUE) > BUSY then return 0 end
local woken = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.due_callbacks(), '-inf', clock.now, 'LIMIT', 0, most)) do
  if redis.call('EXISTS', keys.callback(id)) == 0 then
    redis.call('ZREM', keys.due_callbacks(), id)
    redis.call('ZREM', keys.callbacks(), id)
  else
    redis.call('ZADD', keys.due_callbacks(), clock.after(const.CALLBACK_GRACE_S), id)
    wakeups.callback(id)
    woken = woken + 1
  end
end
return woken
