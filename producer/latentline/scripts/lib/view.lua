-- A job as readers see it.
-- uses: clock

local view = {}

-- {the time, the record, its queue position or nil}. The record is empty where there is none.
function view.of(id)
  local record = redis.call('HGETALL', keys.job(id))
  local job = redis.call('HMGET', keys.job(id), 'status', 'model')
  local position = job[1] == 'queued' and redis.call('ZRANK', keys.waiting(job[2]), id)
  return {clock.now, record, position}
end
