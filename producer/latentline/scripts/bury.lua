-- Keep a dead letter of something that cannot be read.
--
-- Invariant: the letter is stored without being decoded, since Lua's JSON parser may fail on what the caller could not read.
-- uses: clock, memory_bound

local id, letter = unpack(ARGV)

memory_bound.pass(keys.dead_times())
if redis.call('HSETNX', keys.dead(), id, '{"at": "' .. clock.now .. '", ' .. string.sub(letter, 2)) == 1 then
  redis.call('ZADD', keys.dead_times(), clock.now, id)
end
return 1
