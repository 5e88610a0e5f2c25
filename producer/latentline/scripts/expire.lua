-- Forget ended jobs whose retention is over, and callbacks and dead letters that have been kept long enough.
--
-- Invariant: a job stays in `expiring` until its images are deleted. Each call that returns it postpones it by again_s, so
-- that another call retries if this one's caller fails before it has deleted the images.
--
-- Returns tenant/id of each job; the caller deletes the images, then takes the member out of `expiring`.
-- uses: clock

local most, again_s, retention_s, dead_kept_s, dead_most = unpack(ARGV)

local over = redis.call('ZRANGEBYSCORE', keys.expiring(), '-inf', clock.now, 'LIMIT', 0, most)
for _, member in ipairs(over) do
  local id = string.match(member, '/(.*)$')
  redis.call('DEL', keys.job(id), keys.events(id), keys.checkpoint(id), keys.preview(id))
  redis.call('ZREM', keys.index(), id)
  redis.call('ZREM', keys.tenant_index(string.match(member, '^[^/]*')), id)
  for _, status in ipairs({'succeeded', 'failed', 'cancelled'}) do redis.call('ZREM', keys.index(status), id) end
  redis.call('ZADD', keys.expiring(), clock.after(again_s), member)
end

-- The callbacks' own hashes expire by themselves.
redis.call('ZREMRANGEBYSCORE', keys.callbacks(), '-inf', clock.seconds - math.max(retention_s, const.CALLBACK_KEPT_S))

local dead = redis.call('ZRANGEBYSCORE', keys.dead_times(), '-inf', clock.seconds - dead_kept_s, 'LIMIT', 0, most)
local too_many = redis.call('ZCARD', keys.dead_times()) - dead_most
if #dead == 0 and too_many > 0 then
  dead = redis.call('ZRANGE', keys.dead_times(), 0, math.min(too_many, tonumber(most)) - 1)
end
for _, id in ipairs(dead) do
  redis.call('ZREM', keys.dead_times(), id)
  redis.call('HDEL', keys.dead(), id)
end
return over
