-- The event stream of a job.
--
-- Invariant: `seq` rises by one with each event of a job, in the order of its transitions.
-- uses: clock

local events = {}

local MOST = 1000 -- entries of one stream; a job of 150 steps has fewer

-- Append an event; its `seq`.
function events.add(id, kind, data)
  data.seq = redis.call('HINCRBY', keys.job(id), 'seq', 1)
  redis.call('XADD', keys.events(id), 'MAXLEN', '~', MOST, '*', 'type', kind, 'at', clock.now, 'data', cjson.encode(data))
  return data.seq
end
