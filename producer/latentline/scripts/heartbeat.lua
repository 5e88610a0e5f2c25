-- Record that a worker is alive, tell it whether the broker still has its announcement, and what waits for its models.
--
-- Invariant: an announcement holds as long as its worker's heartbeat. One that was lost with the broker's data is not made up
-- for here: the worker announces again in full.
--
-- What the worker does now is a key of its own that soon expires, so that nothing has to clear up after lost workers.
--
-- `models` is a JSON array of model ids. Of each that has jobs which have not ended, the answer tells for how long the oldest
-- of those has waited that this worker could take, in seconds since its last wake-up; 0 while none waits.
--
-- Cost: five commands, and one for each model without jobs. A model with jobs costs up to six, and one for each job that is
-- looked at.
--
-- Returns {} when the announcement is not there, else {'here', model, seconds, model, seconds...}.
-- uses: clock, memory_bound

local worker, working, working_s, models, level = unpack(ARGV)

local LOOKED_AT = 8 -- jobs of one priority; some may be due later, or of a level that this worker does not read

local function longest_wait(model)
  if #redis.call('ZRANGE', keys.waiting(model), 0, 0) == 0 then return 0 end
  local longest = 0
  for _, step in ipairs(const.PRIORITY_STEPS) do
    local first = string.format('%.0f', step * const.PRIORITY_SCORE)
    local last = string.format('(%.0f', (step + 1) * const.PRIORITY_SCORE)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.waiting(model), first, last, 'LIMIT', 0, LOOKED_AT)) do
      local job = redis.call('HMGET', keys.job(id), 'woken_at', 'level')
      if job[1] and tonumber(job[2] or 1) <= tonumber(level) then longest = math.max(longest, clock.seconds - job[1]) end
    end
  end
  return longest
end

memory_bound.pass(keys.leases())
redis.call('ZADD', keys.workers(), clock.now, worker)
redis.call('SET', keys.working(worker), working, 'EX', working_s)
-- HGET and not HEXISTS, which rules of the broker's users from before do not allow to workers.
if not redis.call('HGET', keys.announced(), worker) then return {} end
redis.call('ZADD', keys.announced_at(), clock.now, worker)
local answer = {'here'}
for _, model in ipairs(cjson.decode(models)) do
  if redis.call('EXISTS', keys.open(model)) == 1 then
    answer[#answer + 1] = model
    answer[#answer + 1] = string.format('%.3f', longest_wait(model))
  end
end
return answer
