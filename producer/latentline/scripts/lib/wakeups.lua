-- Celery messages that wake workers up, in the lists that kombu reads.
--
-- Invariants:
-- * A message carries an id and nothing else of a job: the record is the truth, so messages may be lost or doubled.
-- * Messages are numbered by one counter. Those at the end of a list (LPUSH) are in rising order from its front to its end;
--   those put at the front (RPUSH) carry an `f` behind their number. wake.lua finds lost messages by this.
-- * The record's `message` and `woken_at` name its newest message.
-- uses: clock

local wakeups = {}

-- The list of a queue that holds messages of this priority (0 to 9), as kombu names it.
function wakeups.list(queue, priority)
  local step = 0
  for _, start in ipairs(const.PRIORITY_STEPS) do
    if start <= priority then step = start end
  end
  return step == 0 and queue or queue .. const.PRIORITY_SEPARATOR .. step
end

-- Write one message, to be served next (`front`) or last; its id.
function wakeups.send(task, argument, queue, priority, front)
  local message = argument .. '-' .. redis.call('INCR', keys.messages()) .. (front and 'f' or '')
  local values = {task = task, argument = argument, queue = queue, priority = tostring(priority), message = message}
  local text = string.gsub(const.MESSAGE, '@(%l+)@', values)
  redis.call(front and 'RPUSH' or 'LPUSH', wakeups.list(queue, priority), text)
  return message
end

-- Wake a worker for a queued job.
function wakeups.job(id, front)
  local job = redis.call('HMGET', keys.job(id), 'queue', 'priority')
  local message = wakeups.send(const.GENERATE_TASK, id, job[1], tonumber(job[2]), front)
  redis.call('HSET', keys.job(id), 'woken_at', clock.now, 'message', message)
end

-- Wake a deliverer for a callback that is due.
function wakeups.callback(callback_id)
  wakeups.send(const.CALLBACK_TASK, callback_id, const.CALLBACK_QUEUE, 0, false)
end
