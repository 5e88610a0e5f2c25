-- Take a turn at duties of the whole fleet on a broker at its memory bound, which refuses a plain SET.
--
-- Invariant: as SET NX: nothing changes while another process has the turn.
--
-- Returns 1 when the turn was taken, else 0.
-- uses: memory_bound

local duties, worker, life_ms = unpack(ARGV)

memory_bound.pass(keys.leases())
return redis.call('SET', keys.turn(duties), worker, 'NX', 'PX', life_ms) and 1 or 0
