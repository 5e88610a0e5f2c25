"""Maintenance by workers: jobs that no worker holds, overdue jobs, and whatever has been kept long enough."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from latentline import routing
from latentline.scripts import BEGIN_TURN, END_OVERDUE, EXPIRE, RECLAIM, TAKE_TURN, WAKE

from .driving import Driven, Operation, broker_time, call_script, driven, set_if_absent, zrem
from .fleet import ANNOUNCED_S, FORGOTTEN_S

# Crashes without progress while running alone after which the job fails. Crashes beside other jobs do not count: any of them
# may have been the cause.
MAX_CRASHES_ALONE = 2
MAX_WAKE = 256  # Max. waiting jobs checked for a lost message per call.
MAX_RECLAIM = 1000  # Max. expired leases handled per call.
MAX_OVERDUE = 250  # Max. overdue jobs failed per call: each takes about 20 commands in one script.
OVERDUE_AGAIN_S = 5  # Interval at which a running job past its deadline is checked again.
MAX_EXPIRE = 50  # Max. expired jobs deleted per call: each needs calls to the object store.
EXPIRE_AGAIN_S = 600  # Seconds before images that could not be deleted are tried again.
DEAD_KEPT_S, DEAD_MOST = 30 * 86400, 10_000  # Max. age and number of dead letters.


class Maintenance(Driven):
    """Each method is one pass; the maintenance services call it periodically."""

    @driven
    def take_turn(self, duties: str, worker: str, life_s: float) -> Operation[bool]:
        """Whether this process may do these duties now. If so, no other process may for ``life_s``, also if this one ends."""
        try:
            return bool((yield set_if_absent(routing.turn_key(duties), worker, life_s)))
        except redis.exceptions.OutOfMemoryError:  # jobs of lost workers are taken back all the same, and what expires makes room
            return bool((yield from call_script(TAKE_TURN, duties=duties, worker=worker, life_ms=round(life_s * 1000))))

    @driven
    def begin_turn(self, gap_s: float) -> Operation[float]:
        """For how many seconds some worker has reached the broker at least every ``gap_s``; for the process that has the turn."""
        return float((yield from call_script(BEGIN_TURN, gap_s=gap_s, announced_s=ANNOUNCED_S, forgotten_s=FORGOTTEN_S)))

    @driven
    def reclaim(self) -> Operation[list[str]]:
        """Take jobs away from workers whose lease has run out and queue them again; the ids of those jobs.

        A job fails with ``worker_lost`` after ``MAX_CRASHES_ALONE`` crashes without progress while it ran alone.
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
        """Send messages for jobs whose next try is due, and for jobs queued for ``grace_s`` whose message is lost; their ids.

        Each call checks ``MAX_WAKE`` waiting jobs and continues where the previous one ended, whichever worker made it.
        """
        woken: list[str] = yield from call_script(WAKE, model=model, grace_s=grace_s, most=MAX_WAKE)
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
        """Remove jobs whose images have been deleted from the list of expiring ones."""
        yield zrem(routing.expiring_key(), members)
