-- Record that a worker is alive and what it serves.
--
-- Invariants:
-- * The announcement of a worker that has been silent for `announced_s` is removed by the next call of any worker.
-- * `models` holds what version 0.1.0 reads, without the worker's name; nothing in it expires.
-- uses: clock, memory_bound

local worker, announcement, model, first_fields, announced_s, forgotten_s = unpack(ARGV)

memory_bound.pass(keys.leases())
redis.call('ZADD', keys.workers(), clock.now, worker)
redis.call('ZREMRANGEBYSCORE', keys.workers(), '-inf', clock.seconds - forgotten_s)
redis.call('ZADD', keys.announced_at(), clock.now, worker)
redis.call('HSET', keys.announced(), worker, announcement)
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', keys.announced_at(), '-inf', clock.seconds - announced_s, 'LIMIT', 0, 100)) do
  redis.call('ZREM', keys.announced_at(), silent)
  redis.call('HDEL', keys.announced(), silent)
end
redis.call('HSET', keys.models(), model, first_fields)
return 1
