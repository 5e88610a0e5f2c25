-- A worker is alive and serves a model.
-- uses: clock, memory_bound

local worker, model, info, forgotten_s = unpack(ARGV)

memory_bound.pass(keys.leases())
redis.call('ZADD', keys.workers(), clock.now, worker)
redis.call('ZREMRANGEBYSCORE', keys.workers(), '-inf', clock.seconds - forgotten_s)
redis.call('HSET', keys.models(), model, info)
return 1
