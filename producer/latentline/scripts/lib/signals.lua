-- Tell a worker at once what was decided about a job that it runs.
--
-- Invariants:
-- * A signal only saves time. What it tells is in the record as well, and the worker reads that when it renews the lease. So a
--   signal may be lost, and may come when its job has left the worker: it carries the token of the hold that it is meant for.
-- * A list that nobody reads, of a worker that is gone or of version 0.1.0, expires.

local signals = {}

-- verdict: 'cancel' or 'stale'. Called after memory_bound.pass().
function signals.send(worker, id, token, verdict)
  -- pcall: rules of the broker's users from before do not know this key, and the change itself must not fail for that.
  local sent = redis.pcall('LPUSH', keys.signals(worker), verdict .. ' ' .. token .. ' ' .. id)
  if type(sent) == 'number' then redis.call('EXPIRE', keys.signals(worker), const.SIGNAL_KEPT_S) end
end
