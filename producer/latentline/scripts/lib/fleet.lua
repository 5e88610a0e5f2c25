-- What the broker keeps about workers.
-- uses: clock

local fleet = {}

-- Remove workers that have been silent for `forgotten_s`, and the announcements of those that have been for `announced_s`.
-- Readers leave both out by their time, so this only keeps the lists short.
function fleet.forget_silent(announced_s, forgotten_s)
  redis.call('ZREMRANGEBYSCORE', keys.workers(), '-inf', clock.seconds - forgotten_s)
  local silence = clock.seconds - announced_s
  for _, silent in ipairs(redis.call('ZRANGEBYSCORE', keys.announced_at(), '-inf', silence, 'LIMIT', 0, 100)) do
    redis.call('ZREM', keys.announced_at(), silent)
    redis.call('HDEL', keys.announced(), silent)
  end
end
