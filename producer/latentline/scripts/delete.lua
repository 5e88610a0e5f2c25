-- Forget an ended job before its retention is over: its record, its events and its place in every list, at once.
--
-- Invariants:
-- * A job that has not ended stays as it is: its worker would write into a record that is gone.
-- * The job is in `expiring` and due, so that the next turn of a worker deletes its pictures, whatever becomes of the caller.
-- * A callback that is still to be delivered is delivered: it carries what it tells of the job.
--
-- Returns 'deleted', 'unknown', or the status of a job that has not ended.
-- uses: clock

local id = unpack(ARGV)

local job = redis.call('HMGET', keys.job(id), 'status', 'tenant')
local status, tenant = job[1], job[2]
if not status then return 'unknown' end
if status == 'queued' or status == 'running' then return status end
redis.call('ZADD', keys.expiring(), clock.now, tenant .. '/' .. id)
redis.call('ZREM', keys.index(), id)
redis.call('ZREM', keys.index(status), id)
redis.call('ZREM', keys.tenant_index(tenant), id)
redis.call('DEL', keys.job(id), keys.events(id), keys.preview(id))
return 'deleted'
