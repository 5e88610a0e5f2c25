-- What became of the answer to a request: 'dropped', 'written', or 'given up' when its client has not come back for it.
--
-- Invariants:
-- * Only the last request that had the job says anything of it: `sending` is its retry count.
-- * A job that was given up goes to no request any more: its caller may cancel it.
--
-- Returns whether it was noted, 1 or 0.
-- uses: clock

local id, digest, sending, outcome = unpack(ARGV)

local key = keys.job(id)
local job = redis.call('HMGET', key, 'sending', 'answer')
if job[1] ~= sending then return 0 end
if outcome == 'given up' then
  if job[2] ~= 'dropped' then return 0 end
  redis.call('ZREM', keys.unanswered(digest), id)
  redis.call('HDEL', key, 'sending', 'answer')
else
  redis.call('HSET', key, 'answer', outcome)
  if outcome == 'written' then redis.call('HSET', key, 'written_at', clock.now) end
end
return 1
