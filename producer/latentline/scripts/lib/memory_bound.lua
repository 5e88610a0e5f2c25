-- How scripts behave on a broker that has reached maxmemory.
--
-- At maxmemory the broker rejects a script whose first write may allocate. Once a non-allocating write has run, later writes
-- are accepted. Scripts that end work or renew a lease must succeed even then, so they begin with such a write. Scripts that
-- give out work must be rejected, so they write the record first.

local memory_bound = {}

-- Remove a member that no sorted set holds. `key` is a sorted set that the caller's user may write.
function memory_bound.pass(key)
  redis.call('ZREM', key, '')
end
