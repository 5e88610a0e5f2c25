-- Give a request that its client sends again the job that an earlier sending of it has made.
--
-- The `answer` of a job says what became of the last request that had it: 'awaited' (that request is still open, or its
-- process died), 'dropped' (the client closed its connection) or 'written' (the answer went out; it may have been lost on
-- its way). `sending` is the retry count of that request.
--
-- Invariants:
-- * Equal requests are different jobs, and of two that are sent again each gets one of their own: a job is given once for each
--   retry count. So a job goes to a request only while its `sending` is lower.
-- * A job whose client is known to have gone is given before one that may still have its reader, and that before one whose answer
--   went out. Of several the newest.
-- * A job that ended ended_s ago or earlier, or whose answer went out written_s ago or earlier, is given to nobody.
--
-- Returns the id, or '' when there is none.
-- uses: clock

local digest, sending, ended_s, written_s = unpack(ARGV)

local function older(at, seconds)
  return at and clock.seconds - tonumber(at) >= tonumber(seconds)
end

local unanswered, newest = keys.unanswered(digest), {}
for _, id in ipairs(redis.call('ZREVRANGE', unanswered, 0, -1)) do
  local job = redis.call('HMGET', keys.job(id), 'answer', 'sending', 'finished_at', 'written_at')
  local answer, last_sending, finished_at, written_at = job[1], job[2], job[3], job[4]
  if not answer or older(finished_at, ended_s) or older(written_at, written_s) then
    redis.call('ZREM', unanswered, id)
  elseif tonumber(last_sending) < tonumber(sending) and not newest[answer] then
    newest[answer] = id
  end
end
local taken = newest.dropped or newest.awaited or newest.written
if not taken then return '' end
redis.call('HSET', keys.job(taken), 'answer', 'awaited', 'sending', sending)
redis.call('HDEL', keys.job(taken), 'written_at')
return taken
