"""What the worker side does with records: every transition after submission, and looking after what belongs to nobody."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis
from redis.client import NEVER_DECODE

from latentline import routing
from latentline.errors import JobNotFound, StaleToken
from latentline.jobs import LEVEL, Announcement, Claim, ImageRef, JobError, JobRecord, ModelInfo, Phase, Status
from latentline.scripts import (
    ANNOUNCE,
    BEAT,
    BURY,
    CHECKPOINT,
    CLAIM,
    EXPIRE,
    PUT_BACK_CALLBACK,
    RECLAIM,
    RELEASE,
    RETRY,
    SETTLE,
    SETTLE_CALLBACK,
    TAKE_CALLBACK,
    WAKE,
    WAKE_CALLBACKS,
    Script,
)

from .driving import Call, Operation, call_script, call_script_many, pairs, run, zrem
from .fleet import ANNOUNCED_S, durability, models, up_s, workers
from .jobs import get, record_of
from .outbox import callback_of

MAX_ERRORS = 4  # tries that may end in an error that another try might mend
# Workers that may be lost with a job that was no further than ever, before it runs with no other beside it, and then before it
# fails: a job that kills its process takes its neighbours with it, and they must not be blamed.
SUSPECT_CRASHES = 2
MAX_CRASHES_ALONE = 2
WORKER_FORGOTTEN_S = 3600  # the name of a worker that said nothing for this long goes
MAX_WAKE = 256  # waiting jobs of a model that one look for lost messages covers
CHECKPOINT_TTL_S = 86400
MAX_RECLAIM = 1000  # jobs that one look at leases, or at retries that are due, covers
MAX_EXPIRE = 50  # ended jobs that one look forgets: each costs calls to the object store
EXPIRE_AGAIN_S = 600  # until images that could not be deleted are tried again
DEAD_KEPT_S, DEAD_MOST = 30 * 86400, 10_000  # dead letters are kept for a month, and at most so many


class Verdict(StrEnum):
    """What a worker is told of a job that it reports on."""

    GO = "go"
    CANCEL = "cancel"
    STALE = "stale"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Beat:
    """How a job in flight stands."""

    job_id: str
    token: int
    phase: Phase
    step: int
    lease_s: float
    batch_jobs: int = 0
    previews: tuple[str, ...] = ()  # a data: URL per image, when there is a new one


@dataclass(frozen=True)
class Backoff:
    """Seconds before another try: doubling from ``first_s`` with each error of the job, at most ``most_s``, times ``jitter``."""

    first_s: float
    most_s: float
    jitter: float = 1.0


class Records:
    """What workers do with records, on a blocking client.

    Args:
        retention_s: how long an ended job is kept.
        level: of the requests that this worker can read, see :data:`latentline.models.LEVEL`.
    """

    def __init__(self, client: redis.Redis, retention_s: int = 7 * 86400, level: int = LEVEL) -> None:
        self._client = client
        self._retention_s, self._level = retention_s, level
        self._wake_rank = 0  # where the next look for lost messages begins

    def get(self, job_id: str) -> JobRecord:
        return run(self._client, get(job_id))

    def models(self) -> dict[str, ModelInfo]:
        return run(self._client, models())

    def workers(self) -> list[str]:
        return run(self._client, workers())

    def durability(self) -> list[str]:
        return run(self._client, durability())

    def up_s(self) -> float:
        return run(self._client, up_s())

    def suspect(self, job_id: str) -> bool:
        """Whether so many workers were lost with this job that it should run with no other beside it."""
        crashes = self._one(lambda client: client.hget(routing.job_key(job_id), "crashes"))
        return int(crashes or 0) >= SUSPECT_CRASHES

    def claim(self, job_id: str, worker: str, lease_s: float, *, alone: bool = False, claim_id: str | None = None) -> Claim | None:
        """Own the job for ``lease_s`` seconds; None when there is nothing to do for it.

        That is: it has ended, is past its deadline (then it is failed here), waits for its next try, or is running. A claim
        repeated under the same ``claim_id``, because its answer was lost, is answered again.

        Raises:
            JobNotFound: there is no such record, or it is of another version (then it is failed and kept as dead letter).
        """
        reply = self._script(
            CLAIM,
            id=job_id,
            worker=worker,
            lease_s=lease_s,
            retention_s=self._retention_s,
            alone=int(alone),
            claim_id=claim_id or uuid.uuid4().hex,
            level=self._level,
        )
        if reply == "unknown":
            raise JobNotFound(f"no job {job_id!r}: it never existed, or its retention time is over")
        if isinstance(reply, str):
            return None
        raw = pairs(reply)
        token = int(raw["token"])
        try:
            return Claim(record=record_of(raw), token=token)
        except JobNotFound as error:
            failure = JobError(code="unreadable_record", message="the record is of a version that this worker cannot read")
            self._settle(job_id, token, Status.FAILED, "[]", failure, "{}")
            self.bury(job_id, "job", error.message, job_id=job_id, code=failure.code, request=raw["request"])
            raise

    def beat(self, beats: Sequence[Beat]) -> list[Verdict]:
        """Renew leases and store progress of many jobs in one round trip."""

        calls = [
            {
                "id": beat.job_id,
                "token": beat.token,
                "phase": beat.phase.value,
                "step": beat.step,
                "lease_s": beat.lease_s,
                "batch_jobs": beat.batch_jobs,
                "previews": json.dumps(beat.previews) if beat.previews else "",
            }
            for beat in beats
        ]
        return [Verdict(reply) for reply in run(self._client, call_script_many(BEAT, calls))]

    def checkpoint(self, job_id: str, token: int, step: int, data: bytes) -> bool:
        """Keep what another worker needs to go on from ``step`` (in the job's own steps).

        False for a stale token, and when the broker is at its memory bound: jobs go on without.
        """
        return bool(self._script(CHECKPOINT, id=job_id, token=token, step=step, data=data, ttl_s=CHECKPOINT_TTL_S))

    def load_checkpoint(self, job_id: str) -> bytes | None:
        """The newest checkpoint of a job."""
        # The client decodes what it reads, and these are bytes: asked for as such.
        data: bytes | None = self._one(lambda client: client.execute_command("GET", routing.checkpoint_key(job_id), **{NEVER_DECODE: True}))
        return data

    def release(self, job_id: str, token: int) -> bool:
        """Back to the queue with a fresh wake-up, or cancelled if that was asked for; False when somebody else owns the job now."""
        return bool(self._script(RELEASE, id=job_id, token=token, retention_s=self._retention_s))

    def retry(self, job_id: str, token: int, error: JobError, backoff: Backoff) -> tuple[Status, float]:
        """Another try later, or failed and a dead letter after ``MAX_ERRORS``; the status that came of it and the delay in seconds.

        Raises:
            StaleToken: as :meth:`settle`.
        """
        reply = self._script(
            RETRY,
            id=job_id,
            token=token,
            err=error.model_dump_json(),
            first_delay_s=backoff.first_s,
            max_delay_s=backoff.most_s,
            jitter=backoff.jitter,
            max_errors=MAX_ERRORS,
            retention_s=self._retention_s,
        )
        if not reply:
            raise StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
        return Status(reply[0]), float(reply[1])

    def settle(
        self,
        job_id: str,
        token: int,
        status: Status,
        images: Sequence[ImageRef] = (),
        error: JobError | None = None,
        timings: dict[str, float] | None = None,
    ) -> JobRecord:
        """The one terminal transition of a running job.

        Raises:
            StaleToken: the token is not the newest, or the job has ended.
            ValueError: the status is not terminal.
        """
        if not status.terminal:
            raise ValueError(f"status: got {status.value!r}; allowed: a terminal status")
        stored = json.dumps([image.model_dump(mode="json", exclude={"url"}) for image in images])
        reply = self._settle(job_id, token, status, stored, error, json.dumps(timings or {}))
        if not reply:
            raise StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
        return record_of(pairs(reply))

    def reclaim(self) -> list[str]:
        """Take jobs away from workers whose lease has run out and queue them again; the ids of those jobs.

        A job that was alone on ``MAX_CRASHES_ALONE`` lost workers, no further than in its lives before, fails with
        ``worker_lost``: it is what kills them.
        """
        seconds = self._now()
        over = self._one(lambda client: client.zrangebyscore(routing.leases_key(), "-inf", seconds, 0, MAX_RECLAIM))
        return [job_id for job_id in over if self._reclaim_one(job_id)]

    def wake(self, model: str, grace_s: float) -> list[str]:
        """Queue again what is due for its next try, and what has waited for ``grace_s`` while its message is lost; their ids.

        Each call looks at ``MAX_WAKE`` waiting jobs, the next call at the next ones.
        """
        woken, looked_at = self._script(WAKE, model=model, grace_s=grace_s, first_rank=self._wake_rank, most=MAX_WAKE)
        self._wake_rank = self._wake_rank + MAX_WAKE if looked_at == MAX_WAKE else 0
        found: list[str] = woken
        return found

    def expired(self) -> list[str]:
        """Ended jobs whose retention is over, as ``tenant/id``; their records are gone after this, their images may not be."""
        members: list[str] = self._script(
            EXPIRE,
            most=MAX_EXPIRE,
            again_s=EXPIRE_AGAIN_S,
            retention_s=self._retention_s,
            dead_kept_s=DEAD_KEPT_S,
            dead_most=DEAD_MOST,
        )
        return members

    def forget(self, members: Sequence[str]) -> None:
        """The images of these are gone as well."""
        self._one(zrem(routing.expiring_key(), members))

    def take_callback(self, callback_id: str, lock_s: float) -> dict[str, Any] | None:
        """A due callback for one try within ``lock_s``; None when it is delivered, given up, not due yet, or in other hands."""
        reply = self._script(TAKE_CALLBACK, id=callback_id, lock_s=lock_s)
        return callback_of(pairs(reply)) if reply else None

    def settle_callback(self, callback_id: str, tries: int, entry: dict[str, Any], status: str, delay_s: float = 0.0) -> None:
        """Log a try: ``pending`` and due again after ``delay_s``, or ended (delivered, failed, refused, gone).

        Nothing when others have taken it since: ``tries`` is the number of the try, as it was taken.
        """
        self._script(SETTLE_CALLBACK, id=callback_id, tries=tries, entry=json.dumps(entry), status=status, delay_s=delay_s)

    def put_back_callback(self, callback_id: str, tries: int, delay_s: float) -> None:
        """A callback that was taken and not tried: due again after ``delay_s``; ``tries`` as in :meth:`settle_callback`."""
        self._script(PUT_BACK_CALLBACK, id=callback_id, tries=tries, delay_s=delay_s)

    def wake_callbacks(self) -> int:
        """Hand every callback whose next try is due to the deliverers; how many."""
        return int(self._script(WAKE_CALLBACKS, most=MAX_RECLAIM))

    def receiver_disabled(self, url: str) -> bool:
        """Whether this receiver has answered 410 Gone."""
        return bool(self._one(lambda client: client.hexists(routing.disabled_receivers_key(), url)))

    def bury(self, dead_id: str, kind: str, reason: str, **more: Any) -> None:
        """Keep what nobody can read, with its cause."""
        self._script(BURY, id=dead_id, letter=json.dumps({"id": dead_id, "kind": kind, "reason": reason, **more}))

    def announce(self, worker: str, info: ModelInfo) -> None:
        """Say that a worker is alive, on the server's clock, and serves this model."""
        self._script(
            ANNOUNCE,
            worker=worker,
            announcement=Announcement(level=self._level, models=(info,)).to_json(),
            model=info.id,
            first_fields=info.first_fields(),
            announced_s=ANNOUNCED_S,
            forgotten_s=WORKER_FORGOTTEN_S,
        )

    def worker_gone(self, name: str) -> None:
        """Say that a worker has stopped."""
        self._one(lambda client: client.zrem(routing.workers_key(), name))

    def _now(self) -> float:
        """The server's clock."""
        seconds, microseconds = self._one(lambda client: client.time())
        return float(seconds + microseconds / 1e6)

    def _settle(self, job_id: str, token: int, status: Status, images: str, error: JobError | None, timings: str) -> Any:
        return self._script(
            SETTLE,
            id=job_id,
            token=token,
            status=status.value,
            images=images,
            err=error.model_dump_json() if error else "",
            timings=timings,
            retention_s=self._retention_s,
        )

    def _reclaim_one(self, job_id: str) -> bool:
        return bool(self._script(RECLAIM, id=job_id, max_crashes_alone=MAX_CRASHES_ALONE, retention_s=self._retention_s))

    def _script(self, script: Script, **arguments: Any) -> Any:
        return run(self._client, call_script(script, **arguments))

    def _one(self, call: Call) -> Any:
        def operation() -> Operation[Any]:
            return (yield call)

        return run(self._client, operation())
