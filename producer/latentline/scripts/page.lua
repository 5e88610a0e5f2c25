-- A page of jobs, newest first, in one call.
--
-- Invariants:
-- * The record decides, the index only finds it: workers of version 0.1.0 do not know the index of a tenant.
-- * Ids without a record are taken out of the index. That is the only write, and the page comes without it too.
-- * At most `most` entries are looked at and records of `most_bytes` given, one record at least, so a page may be shorter than
--   `limit` while more follow.
-- * `labels` are lines as in the record's field of that name, which jobs accepted by older processes do not have.
--
-- Returns {now, {{record, queue position or nil}...}, score and id after which the next page begins, or ''}.
-- uses: clock

local tenant, status, model, labels, before, after, last_id, limit, most, most_bytes = unpack(ARGV)
limit, most, most_bytes = tonumber(limit), tonumber(most), tonumber(most_bytes)

local index = keys.index()
if tenant ~= '' then index = keys.tenant_index(tenant) elseif status ~= '' then index = keys.index(status) end

local function wanted(id, score, job)
  if last_id ~= '' and tonumber(score) == tonumber(before) and id >= last_id then return false end -- equal scores: descending ids
  for line in string.gmatch(labels, '[^\n]+') do
    if not string.find(job[4] or '', '\n' .. line .. '\n', 1, true) then return false end
  end
  return (status == '' or job[1] == status) and (tenant == '' or job[2] == tenant) and (model == '' or job[3] == model)
end

local function size_of(record)
  local size = 0
  for i = 2, #record, 2 do size = size + #record[i] end
  return size
end

local found, gone, offset, bytes, score, id, more = {}, {}, 0, 0, nil, nil, false
while not more do
  local entries = redis.call('ZRANGE', index, before, after, 'BYSCORE', 'REV', 'LIMIT', offset, limit + 1, 'WITHSCORES')
  for i = 1, #entries, 2 do
    local job = redis.call('HMGET', keys.job(entries[i]), 'status', 'tenant', 'model', labels ~= '' and 'labels' or 'status')
    if not job[1] then -- every record has a status, so there is none
      gone[#gone + 1] = entries[i]
    elseif wanted(entries[i], entries[i + 1], job) then
      if #found == limit or bytes >= most_bytes then more = true break end
      local position = job[1] == 'queued' and redis.call('ZRANK', keys.waiting(job[3]), entries[i])
      local record = redis.call('HGETALL', keys.job(entries[i]))
      found[#found + 1], bytes = {record, position}, bytes + size_of(record)
    end
    id, score = entries[i], entries[i + 1]
  end
  offset = offset + limit + 1
  if #entries < 2 * (limit + 1) then break end
  if offset >= most then more = true end
end
if #gone > 0 then redis.pcall('ZREM', index, unpack(gone)) end
return {clock.now, found, more and string.format('%.0f:%s', tonumber(score), id) or ''}
