-- A tenant's jobs from a time on, oldest first, whose stored request contains a text. It changes nothing.
--
-- Invariants:
-- * A job that is stored after this call has a time that is not before that of the newest one here, unless the clock is
--   set back.
-- * At most `most` entries of the index are looked at. The next call begins at the time of the last one.
--
-- `since` is in milliseconds; when it is empty, the newest `most` jobs are looked at. `known` is a JSON array of ids to leave
-- out.
--
-- Returns {{{id, time, request}...}, time of the last entry looked at or '', number of entries looked at}.

local tenant, since, needle, known, most = unpack(ARGV)

local leave_out = {}
for _, id in ipairs(cjson.decode(known)) do leave_out[id] = true end

local index = keys.tenant_index(tenant)
local entries
if since == '' then
  entries = redis.call('ZRANGE', index, -most, -1, 'WITHSCORES')
else
  entries = redis.call('ZRANGE', index, since, '+inf', 'BYSCORE', 'LIMIT', 0, most, 'WITHSCORES')
end
local found = {}
for i = 1, #entries, 2 do
  local id = entries[i]
  local request = not leave_out[id] and redis.call('HGET', keys.job(id), 'request')
  if request and (needle == '' or string.find(request, needle, 1, true)) then
    found[#found + 1] = {id, string.format('%.0f', tonumber(entries[i + 1])), request}
  end
end
return {found, #entries > 0 and string.format('%.0f', tonumber(entries[#entries])) or '', #entries / 2}
