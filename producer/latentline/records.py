"""Job records in Redis: every transition is one atomic Lua script on the server's clock.

Each operation is written once, as a generator that yields Redis calls and returns its result; :func:`run` drives it
with a blocking client, :func:`arun` with an asyncio one.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import redis
import redis.asyncio
from pydantic import ValidationError

from . import routing
from .errors import BrokerUnavailable, IdempotencyConflict, InvalidRequest, JobNotFound, StaleToken
from .jobs import Claim, ImageRef, JobError, JobEvent, JobRecord, JobRequest, ModelInfo, Phase, Status
from .scripts import BEAT, CANCEL, CLAIM, RECLAIM, RELEASE, SETTLE, SUBMIT

T = TypeVar("T")
Call = Callable[[Any], Any]
Operation = Generator[Call, Any, T]

# A broker that is away, that has become a replica, or that is full.
UNAVAILABLE = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError, OSError)
MAX_PAGE = 200
MAX_ATTEMPTS = 3  # workers that a job may lose before it fails
MAX_RECLAIM = 1000  # running jobs that one look at the leases covers, oldest first
WORKER_ALIVE_S = 10  # a worker that has not beaten for this long is gone


def run(client: redis.Redis, operation: Operation[T]) -> T:
    """Drive an operation with a blocking client.

    Raises:
        BrokerUnavailable: Redis does not answer.
    """
    value: Any = None
    try:
        while True:
            value = operation.send(value)(client)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise BrokerUnavailable(f"the broker does not answer as it should: {type(error).__name__}") from error


async def arun(client: redis.asyncio.Redis, operation: Operation[T]) -> T:
    """Drive an operation with an asyncio client; raises as :func:`run`."""
    value: Any = None
    try:
        while True:
            value = await operation.send(value)(client)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise BrokerUnavailable(f"the broker does not answer as it should: {type(error).__name__}") from error


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
    preview: tuple[str, ...] = ()  # a data: URL per image, when there is a new one


def submit(requests: Sequence[JobRequest], retention_s: int) -> Operation[list[JobRecord]]:
    """Write records, wake-ups, indexes and events of all requests in one pipeline, each atomically."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for request in requests:
            job_id = str(uuid.uuid4())
            queue = routing.queue_name(request.model)
            keys = [
                routing.job_key(job_id),
                routing.events_key(job_id),
                routing.index_key(),
                routing.index_key(Status.QUEUED),
                routing.waiting_key(request.model),
                routing.queue_list(queue, request.priority),
                routing.idempotency_key(request.tenant, request.idempotency_key or ""),
            ]
            pipeline.eval(
                SUBMIT,
                len(keys),
                *keys,
                job_id,
                request.model_dump_json(),
                request.num_inference_steps,
                routing.priority_step(request.priority),  # the order in which kombu serves
                request.deadline_s or 0,
                routing.wake_up(job_id, queue, request.priority),
                request.fingerprint() if request.idempotency_key else "",
                retention_s,
            )
        return pipeline.execute()

    replies = yield call
    records = []
    for request, (outcome, payload, *position) in zip(requests, replies, strict=True):
        if outcome == "conflict":
            raise IdempotencyConflict(f"idempotency key {request.idempotency_key!r} was used with another request (job {payload})")
        if outcome == "same":
            records.append((yield from get(payload)))
        else:
            records.append(_record(_pairs(payload)).model_copy(update={"queue_position": position[0]}))
    return records


def get(job_id: str) -> Operation[JobRecord]:
    """One record; raises JobNotFound."""
    raw = yield lambda client: client.hgetall(routing.job_key(job_id))
    if not raw:
        raise JobNotFound(f"no job {job_id!r}: it never existed, or its retention time is over")
    record = _record(raw)
    if record.status is not Status.QUEUED:
        return record
    position = yield lambda client: client.zrank(routing.waiting_key(record.request.model), job_id)
    return record.model_copy(update={"queue_position": position})


def list_jobs(status: Status | None = None, cursor: str | None = None, limit: int = 50) -> Operation[tuple[list[JobRecord], str | None]]:
    """A page of records, newest first, and the cursor of the next page.

    Raises:
        InvalidRequest: a limit out of range, or a cursor that no page gave.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest("limit", limit, f"1 to {MAX_PAGE}")
    key = routing.index_key(status)
    before, last_id = _read_cursor(cursor) if cursor else ("+inf", "")
    records: list[JobRecord] = []
    offset = 0
    while len(records) <= limit:
        page = yield _index_page(key, before, offset, limit + 1)
        if not page:
            break
        offset += len(page)
        # Equal scores come in descending order of id: skip up to and including the cursor's own.
        wanted = [job_id for job_id, score in page if not (last_id and score == float(before) and job_id >= last_id)]
        raws = yield _hgetall_many(wanted)
        gone = [job_id for job_id, raw in zip(wanted, raws, strict=True) if not raw]
        if gone:  # expired: the index is trimmed when somebody looks
            yield _zrem(key, gone)
            offset -= len(gone)
        records += [_record(raw) for raw in raws if raw]
    following = _cursor(records[limit - 1]) if len(records) > limit else None
    positions = yield _positions(records[:limit])
    placed = [record.model_copy(update={"queue_position": place}) for record, place in zip(records[:limit], positions, strict=True)]
    return placed, following


def cancel(job_id: str, retention_s: int) -> Operation[JobRecord]:
    """Cancel at once when queued, at the next step when running; a terminal job stays as it is."""
    record = yield from get(job_id)
    keys = [
        routing.job_key(job_id),
        routing.events_key(job_id),
        routing.waiting_key(record.request.model),
        routing.index_key(Status.QUEUED),
        routing.index_key(Status.CANCELLED),
    ]
    yield lambda client: client.eval(CANCEL, len(keys), *keys, job_id, retention_s)
    return (yield from get(job_id))


def events(job_id: str, last_event_id: str | None = None, block_ms: int | None = None) -> Operation[list[JobEvent]]:
    """The events after ``last_event_id``; waits up to ``block_ms`` for the first."""
    exists = yield lambda client: client.exists(routing.job_key(job_id))
    if not exists:
        raise JobNotFound(f"no job {job_id!r}: it never existed, or its retention time is over")
    after = last_event_id or "0-0"
    parts = after.split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise InvalidRequest("last_event_id", last_event_id, "an id that this stream gave, such as 1700000000000-0")
    reply = yield lambda client: client.xread({routing.events_key(job_id): after}, block=block_ms)
    streams = reply.items() if isinstance(reply, dict) else reply or []
    found = []
    for _, entries in streams:
        batches = entries if entries and isinstance(entries[0], tuple) else [e for batch in entries for e in batch]
        for event_id, fields in batches:
            data = json.loads(fields.get("data") or "{}")
            found.append(JobEvent(id=event_id, type=fields["type"], job_id=job_id, at=float(fields["at"]), data=data))
    return found


def follow(job_id: str, last_event_id: str | None, block_ms: int) -> Operation[tuple[list[JobEvent], bool]]:
    """One read of a job's events, and whether nothing more can come."""
    # Asked first: a job that ends between the two calls then still has its last event in the read.
    ended = (yield from get(job_id)).status.terminal
    found = yield from events(job_id, last_event_id, None if ended else block_ms)
    return found, ended or any(event.terminal for event in found)


def models() -> Operation[dict[str, ModelInfo]]:
    """Every model that some worker has announced."""
    raw = yield lambda client: client.hgetall(routing.models_key())
    return {model_id: ModelInfo.model_validate_json(info) for model_id, info in sorted(raw.items())}


def workers() -> Operation[list[str]]:
    """Names of the workers that have beaten lately."""
    seconds, _ = yield lambda client: client.time()
    names: list[str] = yield lambda client: client.zrangebyscore(routing.workers_key(), seconds - WORKER_ALIVE_S, "+inf")
    return names


class Records:
    """What workers do with records, on a blocking client."""

    def __init__(self, client: redis.Redis, retention_s: int = 7 * 86400) -> None:
        self._client = client
        self._retention_s = retention_s

    def get(self, job_id: str) -> JobRecord:
        return run(self._client, get(job_id))

    def models(self) -> dict[str, ModelInfo]:
        return run(self._client, models())

    def workers(self) -> list[str]:
        return run(self._client, workers())

    def claim(self, job_id: str, worker: str, lease_s: float) -> Claim | None:
        """Own the job for ``lease_s`` seconds; None when there is nothing to do for it.

        That is: it is unknown, terminal, past its deadline (then it is failed here), or under a live lease.
        """
        request = run(self._client, _hget(job_id, "request"))
        if request is None:
            return None
        model = JobRequest.model_validate_json(request).model
        keys = [
            routing.job_key(job_id),
            routing.events_key(job_id),
            routing.waiting_key(model),
            *(routing.index_key(status) for status in (Status.QUEUED, Status.RUNNING, Status.FAILED)),
        ]
        reply = self._eval(CLAIM, keys, job_id, worker, lease_s, self._retention_s)
        if not reply:
            return None
        raw = _pairs(reply)
        return Claim(record=_record(raw), token=int(raw["token"]))

    def beat(self, beats: Sequence[Beat]) -> list[Verdict]:
        """Renew leases and store progress of many jobs in one round trip."""

        def call(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            for b in beats:
                keys = [routing.job_key(b.job_id), routing.events_key(b.job_id)]
                pipeline.eval(
                    BEAT,
                    2,
                    *keys,
                    b.job_id,
                    b.token,
                    b.phase.value,
                    b.step,
                    b.lease_s,
                    b.batch_jobs,
                    json.dumps(b.preview) if b.preview else "",
                )
            return pipeline.execute()

        def operation() -> Operation[list[Verdict]]:
            replies = yield call
            return [Verdict(reply) for reply in replies]

        return run(self._client, operation())

    def release(self, job_id: str, token: int) -> bool:
        """Back to the queue with a fresh wake-up, or cancelled if that was asked for; False when somebody else owns the job now."""
        keys, wake_up = _back_to_queue(self.get(job_id))
        return bool(self._eval(RELEASE, keys, job_id, token, wake_up, self._retention_s))

    def reclaim(self) -> list[str]:
        """Take jobs away from workers whose lease has run out and queue them again; the ids of those jobs.

        A job that has lost ``MAX_ATTEMPTS`` workers fails with ``worker_lost``: it may be what kills them.
        """
        seconds, _ = self._one(lambda client: client.time())
        running = self._one(lambda client: client.zrange(routing.index_key(Status.RUNNING), 0, MAX_RECLAIM - 1))
        leases = self._one(_leases(running))
        reclaimed = []
        for job_id, lease in zip(running, leases, strict=True):
            if lease is None:
                self._one(_zrem(routing.index_key(Status.RUNNING), [job_id]))  # its record has expired
            elif float(lease) <= seconds:
                keys, wake_up = _back_to_queue(self.get(job_id))
                keys.append(routing.index_key(Status.FAILED))
                if self._eval(RECLAIM, keys, job_id, wake_up, MAX_ATTEMPTS, self._retention_s):
                    reclaimed.append(job_id)
        return reclaimed

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
        keys = [routing.job_key(job_id), routing.events_key(job_id), routing.index_key(Status.RUNNING), routing.index_key(status)]
        stored = json.dumps([image.model_dump(mode="json", exclude={"url"}) for image in images])
        reply = self._eval(
            SETTLE,
            keys,
            job_id,
            token,
            status.value,
            stored,
            error.model_dump_json() if error else "",
            json.dumps(timings or {}),
            self._retention_s,
        )
        if not reply:
            raise StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
        return _record(_pairs(reply))

    def announce_model(self, info: ModelInfo) -> None:
        """Say that a worker serves this model."""
        self._one(lambda client: client.hset(routing.models_key(), info.id, info.model_dump_json()))

    def worker_beat(self, name: str) -> None:
        """Say that a worker is alive, on the server's clock."""
        seconds, _ = self._one(lambda client: client.time())
        self._one(lambda client: client.zadd(routing.workers_key(), {name: seconds}))

    def worker_gone(self, name: str) -> None:
        """Say that a worker has stopped."""
        self._one(lambda client: client.zrem(routing.workers_key(), name))

    def _eval(self, script: str, keys: Sequence[str], *args: Any) -> Any:
        return self._one(lambda client: client.eval(script, len(keys), *keys, *args))

    def _one(self, call: Call) -> Any:
        def operation() -> Operation[Any]:
            return (yield call)

        return run(self._client, operation())


def _hget(job_id: str, field: str) -> Operation[str | None]:
    value: str | None = yield lambda client: client.hget(routing.job_key(job_id), field)
    return value


def _index_page(key: str, before: str, offset: int, count: int) -> Call:
    return lambda client: client.zrange(key, before, "-inf", desc=True, byscore=True, offset=offset, num=count, withscores=True)


def _zrem(key: str, members: Sequence[str]) -> Call:
    return lambda client: client.zrem(key, *members)


def _hgetall_many(job_ids: Sequence[str]) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(routing.job_key(job_id))
        return pipeline.execute()

    return call


def _leases(job_ids: Sequence[str]) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hget(routing.job_key(job_id), "lease_until")
        return pipeline.execute()

    return call


def _back_to_queue(record: JobRecord) -> tuple[list[str], str]:
    """The keys that RELEASE and RECLAIM share, and a fresh wake-up."""
    model, priority = record.request.model, record.request.priority
    queue = routing.queue_name(model)
    keys = [
        routing.job_key(record.id),
        routing.events_key(record.id),
        routing.waiting_key(model),
        routing.index_key(Status.QUEUED),
        routing.index_key(Status.RUNNING),
        routing.queue_list(queue, priority),
        routing.index_key(Status.CANCELLED),
    ]
    return keys, routing.wake_up(record.id, queue, priority)


def _positions(records: Sequence[JobRecord]) -> Call:
    """A call that gives the queue position of each record, None where it is not queued."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for record in records:
            pipeline.zrank(routing.waiting_key(record.request.model), record.id)
        return pipeline.execute()

    return call


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _record(raw: dict[str, str]) -> JobRecord:
    try:
        return JobRecord(
            id=raw["id"],
            request=JobRequest.model_validate_json(raw["request"]),
            status=Status(raw["status"]),
            phase=Phase(raw["phase"]) if raw.get("phase") else None,
            step=int(raw.get("step", 0)),
            num_steps=int(raw["num_steps"]),
            attempt=int(raw.get("attempt", 0)),
            worker=raw.get("worker"),
            cancel_requested=raw.get("cancel_requested") == "1",
            created_at=float(raw["created_at"]),
            started_at=float(raw["started_at"]) if "started_at" in raw else None,
            finished_at=float(raw["finished_at"]) if "finished_at" in raw else None,
            images=tuple(ImageRef.model_validate(image) for image in json.loads(raw.get("images", "[]"))),
            error=JobError.model_validate_json(raw["error"]) if raw.get("error") else None,
            timings=json.loads(raw.get("timings", "{}")),
        )
    except (KeyError, ValueError, ValidationError) as error:
        raise JobNotFound(f"job {raw.get('id')!r} has a record that this version cannot read") from error


def _cursor(record: JobRecord) -> str:
    return base64.urlsafe_b64encode(f"{round(record.created_at * 1000)}:{record.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[str, str]:
    try:
        score, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(":", 1)
        return str(int(score)), job_id
    except ValueError:
        raise InvalidRequest("cursor", cursor, "a cursor that an earlier page gave") from None


__all__ = [
    "Beat", "Operation", "Records", "Verdict", "arun", "cancel", "events", "get", "list_jobs", "models", "run", "submit", "workers",
]  # fmt: skip
