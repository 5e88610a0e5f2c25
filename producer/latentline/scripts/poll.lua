-- One job and one API key, which is all that a poll needs; it changes nothing.
--
-- Returns {what view.lua returns of the job, the key's record, which is empty where there is none}.
-- uses: view

local id, prefix = unpack(ARGV)

return {view.of(id), redis.call('HGETALL', keys.api_key(prefix))}
