"""What workers do for jobs that no worker holds, and for what has been kept long enough."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from latentline import routing
from latentline.jobs import DEFAULT_RETENTION_S, LEVEL
from latentline.scripts import END_OVERDUE, EXPIRE, RECLAIM, WAKE

from .driving import Driven, Operation, broker_time, call_script, driven, zrem

# Workers that may be lost with a job that ran alone and was no further than ever, before it fails. Before that it has run
# beside others: a job that kills its process takes its neighbours with it, and they must not be blamed.
MAX_CRASHES_ALONE = 2
MAX_WAKE = 256  # waiting jobs of a model that one look for lost messages covers
MAX_RECLAIM = 1000  # jobs that one look at leases covers
MAX_OVERDUE = 250  # queued jobs that one look fails for their deadlines: each takes about 20 commands in one script
OVERDUE_AGAIN_S = 5  # until a running job that is past its deadline, and that its worker has not ended, is looked at again
MAX_EXPIRE = 50  # ended jobs that one look forgets: each costs calls to the object store
EXPIRE_AGAIN_S = 600  # until images that could not be deleted are tried again
DEAD_KEPT_S, DEAD_MOST = 30 * 86400, 10_000  # dead letters are kept for a month, and at most so many


class Maintenance(Driven):
    """Each of these is one look; services of the worker repeat them."""

    def __init__(self, client: redis.Redis, retention_s: int = DEFAULT_RETENTION_S, level: int = LEVEL) -> None:
        super().__init__(client, retention_s, level)
        self._wake_rank = 0  # where the next look for lost messages begins

    @driven
    def reclaim(self) -> Operation[list[str]]:
        """Take jobs away from workers whose lease has run out and queue them again; the ids of those jobs.

        A job that was alone on ``MAX_CRASHES_ALONE`` lost workers, no further than in its lives before, fails with
        ``worker_lost``: it is what kills them.
        """
        now = yield from broker_time()
        over = yield lambda client: client.zrangebyscore(routing.leases_key(), "-inf", now, 0, MAX_RECLAIM)
        taken = []
        for job_id in over:
            if (yield from call_script(RECLAIM, id=job_id, max_crashes_alone=MAX_CRASHES_ALONE, retention_s=self._retention_s)):
                taken.append(job_id)
        return taken

    @driven
    def end_overdue(self) -> Operation[list[str]]:
        """Fail queued jobs whose deadline has passed, with ``deadline_exceeded``; their ids."""
        ended: list[str] = yield from call_script(END_OVERDUE, most=MAX_OVERDUE, again_s=OVERDUE_AGAIN_S, retention_s=self._retention_s)
        return ended

    @driven
    def wake(self, model: str, grace_s: float) -> Operation[list[str]]:
        """Queue again what is due for its next try, and what has waited for ``grace_s`` while its message is lost; their ids.

        Each call looks at ``MAX_WAKE`` waiting jobs, the next call at the next ones.
        """
        woken: list[str]
        woken, looked_at = yield from call_script(WAKE, model=model, grace_s=grace_s, first_rank=self._wake_rank, most=MAX_WAKE)
        self._wake_rank = self._wake_rank + MAX_WAKE if looked_at == MAX_WAKE else 0
        return woken

    @driven
    def expired(self) -> Operation[list[str]]:
        """Ended jobs whose retention is over, as ``tenant/id``; their records are gone after this, their images may not be."""
        members: list[str] = yield from call_script(
            EXPIRE,
            most=MAX_EXPIRE,
            again_s=EXPIRE_AGAIN_S,
            retention_s=self._retention_s,
            dead_kept_s=DEAD_KEPT_S,
            dead_most=DEAD_MOST,
        )
        return members

    @driven
    def forget(self, members: Sequence[str]) -> Operation[None]:
        """The images of these are gone as well."""
        yield zrem(routing.expiring_key(), members)
