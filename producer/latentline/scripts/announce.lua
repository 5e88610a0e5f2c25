-- Record that a worker is alive and what it serves: at its start, and whenever heartbeat.lua finds nothing of it.
--
-- Invariants:
-- * A worker in `announced` is in `announced:at` as well: scripts write and remove the two together.
-- * `models` holds what version 0.1.0 reads, without the worker's name; nothing in it expires.
-- uses: clock, fleet, memory_bound

local worker, announcement, first_fields, announced_s, forgotten_s = unpack(ARGV)

memory_bound.pass(keys.leases())
redis.call('ZADD', keys.workers(), clock.now, worker)
redis.call('ZADD', keys.announced_at(), clock.now, worker)
redis.call('HSET', keys.announced(), worker, announcement)
for model, fields in pairs(cjson.decode(first_fields)) do redis.call('HSET', keys.models(), model, fields) end
fleet.forget_silent(announced_s, forgotten_s)
return 1
