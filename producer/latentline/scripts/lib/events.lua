-- The event stream of a job.
--
-- Invariants:
-- * `seq` rises by one with each event of a job, in the order of its transitions.
-- * The stream holds no picture. The newest preview of a job stands beside it (keys.preview) under the `seq` of its event, and
--   goes when the job ends: a stream is kept as long as the record, on a broker that evicts nothing.
-- uses: clock

local events = {}

local MOST = 1000 -- entries of one stream; a job of 150 steps has fewer

-- Append an event whose data, with its `seq`, is JSON already. The caller has stored that `seq` in the record.
-- `account` is what a worker tells of the attempt that the event ends, or nil or empty: it goes beside the data, for the
-- job's timeline, and followers of the stream are not given it.
function events.append(id, kind, data, account)
  local more = account and account ~= '' and {'account', account} or {}
  redis.call('XADD', keys.events(id), 'MAXLEN', '~', MOST, '*', 'type', kind, 'at', clock.now, 'data', data, unpack(more))
end

-- Append an event; its `seq`.
function events.add(id, kind, data, account)
  data.seq = redis.call('HINCRBY', keys.job(id), 'seq', 1)
  events.append(id, kind, cjson.encode(data), account)
  return data.seq
end

-- Append an event that there is a new preview. `images` is a JSON array; it is kept beside the stream.
function events.add_preview(id, data, images)
  data.seq = redis.call('HINCRBY', keys.job(id), 'seq', 1)
  local open = string.sub(cjson.encode(data), 1, -2) .. ', "images": ' -- the images are large: they are not decoded here
  events.append(id, 'job.preview', open .. '[]}')
  redis.call('HSET', keys.preview(id), 'seq', data.seq, 'data', open .. images .. '}')
  redis.call('EXPIRE', keys.preview(id), const.PREVIEW_KEPT_S)
end
