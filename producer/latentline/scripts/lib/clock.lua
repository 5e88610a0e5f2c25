-- The broker's clock. No worker's clock enters a record: it may be wrong by minutes.

local clock = {}

local time = redis.call('TIME')

clock.now = string.format('%d.%06d', time[1], time[2]) -- Unix seconds as text: a Lua number would lose digits
clock.seconds = tonumber(clock.now)
clock.ms = math.floor(time[1] * 1000 + time[2] / 1000)

-- The time `seconds` from now, as records store it.
function clock.after(seconds)
  return string.format('%.6f', clock.seconds + seconds)
end

-- Whether a stored time has come; false for a field that is not set.
function clock.reached(at)
  return at and tonumber(at) <= clock.seconds
end
