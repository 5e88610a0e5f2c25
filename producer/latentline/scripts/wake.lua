-- Wake queued jobs again whose next try is due, or whose message is lost.
--
-- A message is lost when its list does not hold it although its job has been queued for longer than a message needs to be
-- claimed (grace_s). To search every list for every message would cost the square of the queue's length. The numbers of
-- messages make it one look at the front of each list:
--
-- * Messages written to the end of a list carry rising numbers, so from the front on they stand in rising order. Let n be
--   the number of the foremost one. A message numbered below n cannot stand behind it, so it is not there. One numbered n or
--   above counts as there; should it be missing, it is found once the messages before it have been taken.
-- * Messages written to the front (marked `f`) stand before all of those, so they are looked up among the messages that
--   precede the foremost numbered one.
-- * kombu puts messages of lost consumers back at the front under their old number. That lowers n, so a lost message may be
--   found later, but none that is there is ever taken for lost.
-- * At most SCANNED front messages are looked at. If no numbered one is among them, every message counts as there.
--
-- Each call looks at `most` waiting jobs and goes on where the last call ended, whichever worker made it: `turns` holds that
-- rank of each model. A broker at its memory bound may refuse to note it. Then the same jobs are looked at again, and it would
-- not take their messages either.
--
-- Invariant: a job has at most one message more than it needs, and a queued job never waits for ever without one.
--
-- Returns the ids of the jobs that were woken.
-- uses: clock, wakeups

local model, grace_s, most = unpack(ARGV)

local SCANNED = 512 -- front messages of one list that are read; each is one LINDEX near the list's end

local woken = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.delayed(), '-inf', clock.now, 'LIMIT', 0, most)) do
  redis.call('ZREM', keys.delayed(), id)
  if redis.call('HGET', keys.job(id), 'status') == 'queued' then
    wakeups.job(id, true)
    woken[#woken + 1] = id
  end
end

-- {front = set of messages before the foremost numbered one, number = its number, unknown = none was found}
local function read_front(list)
  local head = {front = {}, number = math.huge}
  for i = 1, SCANNED do
    local text = redis.call('LINDEX', list, -i)
    if not text then return head end
    local message, number, mark = string.match(text, '"id": ?"([^"]*%-(%d+)(f?))"')
    if mark == '' then
      head.number = tonumber(number)
      return head
    end
    if message then head.front[message] = true end
  end
  head.number, head.unknown = 0, true
  return head
end

local heads = {}
local function holds(list, message)
  heads[list] = heads[list] or read_front(list)
  local head = heads[list]
  local number, mark = string.match(message, '(%d+)(f?)$')
  if mark == 'f' then return head.unknown or head.front[message] end
  return tonumber(number) >= head.number
end

local rank = 'wake:' .. model
local first = tonumber(redis.call('HGET', keys.turns(), rank) or 0)
local waiting = redis.call('ZRANGE', keys.waiting(model), first, first + most - 1)
local following = #waiting == tonumber(most) and first + #waiting or 0
if following ~= first then redis.pcall('HSET', keys.turns(), rank, following) end
local lost = {}
for _, id in ipairs(waiting) do
  local job = redis.call('HMGET', keys.job(id), 'woken_at', 'message', 'queue', 'priority', 'deadline_at')
  local woken_at, message, queue, priority, deadline_at = job[1], job[2], job[3], tonumber(job[4]), job[5]
  if not woken_at then
    redis.call('ZREM', keys.waiting(model), id) -- its record has expired
  else
    -- A job that was submitted by version 0.1.0 is not in `deadlines` yet. A broker at its memory bound refuses: then later.
    if deadline_at then redis.pcall('ZADD', keys.deadlines(), 'NX', deadline_at, id) end
    if clock.reached(woken_at + grace_s) and not redis.call('ZSCORE', keys.delayed(), id) then
      if not holds(wakeups.list(queue, priority), message) then lost[#lost + 1] = id end
    end
  end
end
for i = #lost, 1, -1 do -- each goes to the front, so the oldest comes last and stands first
  wakeups.job(lost[i], true)
  woken[#woken + 1] = lost[i]
end
return woken
