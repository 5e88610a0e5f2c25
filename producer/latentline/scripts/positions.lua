-- The places of jobs in the queues of their models; it changes nothing.
--
-- `jobs` is a JSON array of {id, model}. Returns for each its place, 0 for the next one, or -1 for a job that does not wait.

local jobs = unpack(ARGV)

local places = {}
for i, job in ipairs(cjson.decode(jobs)) do places[i] = redis.call('ZRANK', keys.waiting(job[2]), job[1]) or -1 end
return places
