-- How a transition gets through on a broker that is at its memory bound.
--
-- Such a broker refuses a script's first write if that write takes memory, and refuses none that follows a write which takes
-- none. A transition that ends work, or keeps it in its owner's hands, must get through, so it makes such a write first.
-- A transition that gives out work must be refused: it writes its record first.

local memory_bound = {}

-- Remove a member that no sorted set holds. `key` is a sorted set that the caller's user may write.
function memory_bound.pass(key)
  redis.call('ZREM', key, '')
end
