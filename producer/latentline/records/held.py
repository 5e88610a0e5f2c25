"""What a worker does with a job that it holds, from claim to settled record."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from redis.client import NEVER_DECODE

from latentline import routing
from latentline.errors import JobNotFound, StaleToken
from latentline.jobs import Claim, ImageRef, JobError, JobRecord, JobWarning, Phase, Status
from latentline.scripts import BEAT, CHECKPOINT, CLAIM, RELEASE, RETRY, SETTLE, WARN

from .dead import bury
from .driving import Driven, Operation, call_script, call_script_many, driven, pairs
from .stored import record_of

MAX_ERRORS = 4  # Retryable errors after which a job fails.
SUSPECT_CRASHES = 2  # Crashes without progress after which a job runs alone.
CHECKPOINT_TTL_S = 86400
# Of one call of beat.lua. The broker serves nobody else while it runs one: 256 jobs without previews take it some milliseconds.
MAX_BEATS = 64
MAX_BEAT_BYTES = 256 * 1024


class Verdict(StrEnum):
    """What a worker has to do with a job that it holds."""

    GO = "go"
    CANCEL = "cancel"
    STALE = "stale"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Beat:
    """What a worker reports of a job in flight."""

    job_id: str
    token: int
    phase: Phase
    step: int
    lease_s: float  # for how long its lease is renewed; 0 leaves the lease as it is
    batch_jobs: int = 0
    previews: tuple[str, ...] = ()  # a data: URL per image, when there is a new one


class Signal(NamedTuple):
    """What was decided about a job, told to the worker that holds it under this token."""

    job_id: str
    token: int
    verdict: Verdict


@dataclass(frozen=True)
class Backoff:
    """Seconds before another try: doubling from ``first_s`` with each error of the job, at most ``most_s``, times ``jitter``."""

    first_s: float
    most_s: float
    jitter: float = 1.0


class HeldJobs(Driven):
    """Claims, and what only their holder may do: each call is checked against the newest fencing token."""

    @driven
    def suspect(self, job_id: str) -> Operation[bool]:
        """Whether this job has had so many crashes without progress that it should run alone."""
        crashes = yield lambda client: client.hget(routing.job_key(job_id), "crashes")
        return int(crashes or 0) >= SUSPECT_CRASHES

    @driven
    def claim(
        self, job_id: str, worker: str, lease_s: float, *, alone: bool = False, claim_id: str | None = None
    ) -> Operation[Claim | None]:
        """Own the job for ``lease_s`` seconds; None when there is nothing to do for it.

        That is: it has ended, is past its deadline (then it is failed here), waits for its next try, is running, or has a higher
        level than this worker. A claim repeated under the same ``claim_id``, because its answer was lost, is answered again.

        Raises:
            JobNotFound: there is no such record, or it is of another version (then it is failed and kept as dead letter).
        """
        reply = yield from call_script(
            CLAIM,
            id=job_id,
            worker=worker,
            lease_s=lease_s,
            retention_s=self._retention_s,
            alone=int(alone),
            claim_id=claim_id or uuid.uuid4().hex,
            level=self.level,
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
            yield from self._settle(job_id, token, Status.FAILED, "[]", failure, "{}")
            yield from bury(job_id, "job", error.message, job_id=job_id, code=failure.code, request=raw["request"])
            raise

    @driven
    def beat(self, beats: Sequence[Beat]) -> Operation[list[Verdict]]:
        """Renew leases and store progress: one round trip, and one script call unless there is much to send."""
        replies = yield from call_script_many(BEAT, [{"beats": part} for part in _beats_as_json(beats)])
        return [Verdict(verdict) for verdicts in replies for verdict in verdicts]

    @driven
    def next_signal(self, worker: str, wait_s: float) -> Operation[Signal | None]:
        """The oldest signal for this worker that is unread, and unread no more; None if none comes within ``wait_s``."""
        found = yield lambda client: client.brpop([routing.signals_key(worker)], wait_s)
        if not found:
            return None
        verdict, token, job_id = found[1].split(" ", 2)
        return Signal(job_id, int(token), Verdict(verdict))

    @driven
    def checkpoint(self, job_id: str, token: int, step: int, data: bytes) -> Operation[bool]:
        """Keep what another worker needs to go on from ``step`` (in the job's own steps).

        False for a stale token, and when the broker has reached maxmemory: the job then continues without a checkpoint.
        """
        return bool((yield from call_script(CHECKPOINT, id=job_id, token=token, step=step, data=data, ttl_s=CHECKPOINT_TTL_S)))

    @driven
    def load_checkpoint(self, job_id: str) -> Operation[bytes | None]:
        """The newest checkpoint of a job."""
        # The client decodes what it reads unless it is told not to, and these are bytes.
        data: bytes | None = yield lambda client: client.execute_command("GET", routing.checkpoint_key(job_id), **{NEVER_DECODE: True})
        return data

    @driven
    def release(self, job_id: str, token: int, account: str = "") -> Operation[bool]:
        """Back to the queue with a fresh wake-up, or cancelled if that was asked for; False when another worker owns the job now.

        Args:
            account: of this attempt (:class:`latentline.timeline.Account`), also in :meth:`retry` and :meth:`settle`.
        """
        return bool((yield from call_script(RELEASE, id=job_id, token=token, retention_s=self._retention_s, account=account)))

    @driven
    def retry(self, job_id: str, token: int, error: JobError, backoff: Backoff, account: str = "") -> Operation[tuple[Status, float]]:
        """Another try later, or failed and a dead letter after ``MAX_ERRORS``; the status that came of it and the delay in seconds.

        Raises:
            StaleToken: as :meth:`settle`.
        """
        reply = yield from call_script(
            RETRY,
            id=job_id,
            token=token,
            err=error.model_dump_json(),
            first_delay_s=backoff.first_s,
            max_delay_s=backoff.most_s,
            jitter=backoff.jitter,
            max_errors=MAX_ERRORS,
            retention_s=self._retention_s,
            account=account,
        )
        if not reply:
            raise _stale(job_id, token)
        return Status(reply[0]), float(reply[1])

    @driven
    def warn(self, job_id: str, token: int, warnings: Sequence[JobWarning]) -> Operation[bool]:
        """Say something about a running job, for its record, its last event and its callback; False for a stale token."""
        text = json.dumps([warning.model_dump() for warning in warnings])
        return bool((yield from call_script(WARN, id=job_id, token=token, warnings=text)))

    @driven
    def settle(
        self,
        job_id: str,
        token: int,
        status: Status,
        images: Sequence[ImageRef] = (),
        error: JobError | None = None,
        timings: dict[str, float] | None = None,
        account: str = "",
    ) -> Operation[JobRecord]:
        """The one terminal transition of a running job.

        Raises:
            StaleToken: the token is not the newest, or the job has ended.
            ValueError: the status is not terminal.
        """
        if not status.terminal:
            raise ValueError(f"status: got {status.value!r}; allowed: a terminal status")
        stored = json.dumps([image.model_dump(mode="json", exclude={"url", "pixels_sha256"}) for image in images])
        pixels = json.dumps([image.pixels_sha256 for image in images]) if images else ""
        reply = yield from self._settle(job_id, token, status, stored, error, json.dumps(timings or {}), account, pixels)
        if not reply:
            raise _stale(job_id, token)
        return record_of(pairs(reply))

    def _settle(
        self,
        job_id: str,
        token: int,
        status: Status,
        images: str,
        error: JobError | None,
        timings: str,
        account: str = "",
        pixels: str = "",
    ) -> Operation[Any]:
        return call_script(
            SETTLE,
            id=job_id,
            token=token,
            status=status.value,
            images=images,
            pixels=pixels,
            err=error.model_dump_json() if error else "",
            timings=timings,
            retention_s=self._retention_s,
            account=account,
        )


def _beats_as_json(beats: Sequence[Beat]) -> Iterator[str]:
    """The beats as the arguments of one or more calls of beat.lua."""
    part: list[str] = []
    for beat in beats:
        fields = {
            "id": beat.job_id,
            "token": beat.token,
            "phase": beat.phase.value,
            "step": beat.step,
            "lease_s": beat.lease_s,
            "batch_jobs": beat.batch_jobs,
            "previews": json.dumps(beat.previews) if beat.previews else "",
        }
        text = json.dumps(fields)
        if part and (len(part) >= MAX_BEATS or sum(map(len, part)) + len(text) > MAX_BEAT_BYTES):
            yield f"[{','.join(part)}]"
            part = []
        part.append(text)
    if part:
        yield f"[{','.join(part)}]"


def _stale(job_id: str, token: int) -> StaleToken:
    return StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
