-- Note that a worker has a turn, and tell for how long turns have followed each other without a gap.
--
-- Invariants:
-- * `since` is the beginning of the present run of turns. A gap of more than gap_s before a turn begins a new run, and so does
--   the first turn that the broker's data knows of. Any process that does a turn afterwards finds that, also one that has just
--   started or that noticed nothing of the gap.
-- * The clock is the broker's, so a failover to a replica or old data that was restored shows as a gap as well.
--
-- Returns the length of the run in seconds, as text.
-- uses: clock, fleet, memory_bound

local gap_s, announced_s, forgotten_s = unpack(ARGV)

memory_bound.pass(keys.leases())
local run = redis.call('HMGET', keys.turns(), 'at', 'since')
local at, since = tonumber(run[1]), tonumber(run[2])
if not at or not since or clock.seconds - at > tonumber(gap_s) then
  since = clock.seconds
  redis.call('HSET', keys.turns(), 'since', clock.now)
end
redis.call('HSET', keys.turns(), 'at', clock.now)
fleet.forget_silent(announced_s, forgotten_s)
return tostring(clock.seconds - since)
