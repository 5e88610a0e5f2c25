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
from redis.client import NEVER_DECODE

from . import routing
from .errors import BrokerUnavailable, IdempotencyConflict, InvalidRequest, JobNotFound, StaleToken, TenantQuotaExceeded
from .jobs import Claim, ImageRef, JobError, JobEvent, JobRecord, JobRequest, ModelInfo, Phase, Status
from .scripts import (
    BEAT,
    CANCEL,
    CHECKPOINT,
    CLAIM,
    EXPIRE,
    PUT_BACK_CALLBACK,
    RECLAIM,
    RELEASE,
    REPLAY_CALLBACK,
    RETRY,
    SETTLE,
    SETTLE_CALLBACK,
    SUBMIT,
    TAKE_CALLBACK,
    WAKE,
    WAKE_CALLBACKS,
)  # fmt: skip

T = TypeVar("T")
Call = Callable[[Any], Any]
Operation = Generator[Call, Any, T]

# A broker that is away, that has become a replica, or that is full.
UNAVAILABLE = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError, OSError)
MAX_PAGE = 200
MAX_ERRORS = 4  # tries that may end in an error that another try might mend
# Workers that may be lost with a job in flight before it runs with no other beside it, and then before it fails: a job
# that kills its process takes its neighbours with it, and they must not be blamed.
SUSPECT_CRASHES = 2
MAX_CRASHES_ALONE = 2
MAX_WAKE = 256  # waiting jobs of a model that one look for lost messages covers
CHECKPOINT_TTL_S = 86400
AOF_TIMEOUT_MS = 2000
MAX_RECLAIM = 1000  # running jobs that one look at the leases covers, oldest first
WORKER_ALIVE_S = 10  # a worker that has not beaten for this long is gone


def run(client: redis.Redis, operation: Operation[T]) -> T:
    """Drive an operation with a blocking client.

    Raises:
        BrokerUnavailable: Redis does not answer.
    """
    try:
        call = operation.send(None)
        while True:
            try:
                value = call(client)
            except redis.ResponseError as error:
                call = operation.throw(error)  # the operation may know what to make of a refusal
            else:
                call = operation.send(value)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise _unavailable(error) from error


async def arun(client: redis.asyncio.Redis, operation: Operation[T]) -> T:
    """Drive an operation with an asyncio client; raises as :func:`run`."""
    try:
        call = operation.send(None)
        while True:
            try:
                value = await call(client)
            except redis.ResponseError as error:
                call = operation.throw(error)  # the operation may know what to make of a refusal
            else:
                call = operation.send(value)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> BrokerUnavailable:
    """What is the matter, without the text of the error: it may hold a name or an address."""
    if isinstance(error, redis.AuthenticationError):
        return BrokerUnavailable("the broker refuses the user or the password of LATENTLINE_REDIS_URL")
    if "certificate verify failed" in str(error):
        return BrokerUnavailable("the broker's certificate is not trusted: see ssl_ca_certs in LATENTLINE_REDIS_URL")
    return BrokerUnavailable(f"the broker does not answer as it should: {type(error).__name__}")


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


def submit(requests: Sequence[JobRequest], retention_s: int, *, tenant_cap: int = 0, durable: bool = False) -> Operation[list[JobRecord]]:
    """Write records, wake-ups, indexes and events of all requests in one pipeline, each atomically.

    Args:
        retention_s: how long an idempotency key is kept.
        tenant_cap: rows of denoising that one tenant may have queued and running; 0 for no bound. One job always fits.
        durable: return only when the append-only file holds them (WAITAOF).

    Raises:
        IdempotencyConflict, TenantQuotaExceeded: for the first request that is refused; those before it are accepted.
        BrokerUnavailable: also when ``durable`` was asked for and the file is not written in time.
    """

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for request in requests:
            callback = request.callback
            pipeline.eval(
                SUBMIT,
                0,
                str(uuid.uuid4()),
                request.model_dump_json(),
                request.num_inference_steps,
                request.model,
                request.tenant,
                request.priority,
                routing.priority_step(request.priority),  # the order in which kombu serves
                request.deadline_s or 0,
                request.cost,
                tenant_cap,
                routing.idempotency_key(request.tenant, request.idempotency_key or ""),
                request.fingerprint() if request.idempotency_key else "",
                retention_s,
                callback.url if callback else "",
                json.dumps(callback.events) if callback else "",
            )
        if durable:  # on the connection that wrote
            pipeline.execute_command("WAITAOF", 1, 0, AOF_TIMEOUT_MS)
        return pipeline.execute()

    try:
        replies = yield call
    except redis.ResponseError as error:
        if "WAITAOF" not in str(error):
            raise
        raise BrokerUnavailable("the broker has no append-only file, and durable jobs were asked for: set appendonly yes") from error
    written = replies.pop()[0] if durable else 1
    records = []
    for request, (outcome, payload, *position) in zip(requests, replies, strict=True):
        if outcome == "conflict":
            raise IdempotencyConflict(f"idempotency key {request.idempotency_key!r} was used with another request (job {payload})")
        if outcome == "full":
            raise TenantQuotaExceeded(
                f"tenant {request.tenant!r} has {payload} rows queued and running: {request.cost} more exceed the {tenant_cap} allowed"
            )
        if outcome == "same":
            records.append((yield from get(payload)))
        else:
            records.append(_record(_pairs(payload)).model_copy(update={"queue_position": position[0]}))
    if not written:
        raise BrokerUnavailable(f"the broker has not written its append-only file within {AOF_TIMEOUT_MS} ms; the jobs may still run")
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
    yield from get(job_id)  # raises for an unknown one
    yield lambda client: client.eval(CANCEL, 0, job_id, retention_s)
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


def callbacks(job_id: str | None = None, limit: int = 50) -> Operation[list[dict[str, Any]]]:
    """Callbacks with their logs, newest first; of one job or of all."""
    found: list[str] = yield lambda client: client.zrange(routing.callbacks_key(), 0, -1, desc=True)
    wanted = [cid for cid in found if job_id is None or cid.startswith(f"msg_{job_id}_")][:limit]
    raws = yield _hgetall_many(wanted, routing.callback_key)
    return [_callback(raw) for raw in raws if raw]


def replay_callback(callback_id: str) -> Operation[bool]:
    """Send a callback once more, whatever came of it, also to a receiver that said Gone; False when it is not known."""
    return bool((yield lambda client: client.eval(REPLAY_CALLBACK, 0, callback_id)))


def dead_letters() -> Operation[list[dict[str, Any]]]:
    """Jobs that were given up and messages that nobody could read, newest first."""
    raw = yield lambda client: client.hgetall(routing.dead_key())
    return sorted((json.loads(letter) for letter in raw.values()), key=lambda letter: float(letter["at"]), reverse=True)


def dead_letter(dead_id: str) -> Operation[dict[str, Any]]:
    """One dead letter; raises JobNotFound."""
    raw = yield lambda client: client.hget(routing.dead_key(), dead_id)
    if raw is None:
        raise JobNotFound(f"no dead letter {dead_id!r}")
    letter: dict[str, Any] = json.loads(raw)
    return letter


def drop_dead_letter(dead_id: str) -> Operation[None]:
    """Forget a dead letter; raises JobNotFound."""
    yield from dead_letter(dead_id)
    yield lambda client: client.hdel(routing.dead_key(), dead_id)


def durability() -> Operation[list[str]]:
    """What of the broker's settings may lose jobs, as sentences; empty when all is well."""
    try:
        found: dict[str, str] = yield lambda client: client.config_get("appendonly", "maxmemory-policy", "maxmemory")
    except redis.ResponseError:
        return ["the broker does not let its settings be read: whether jobs survive its restart is not known"]
    problems = []
    if found.get("appendonly") != "yes":
        problems.append("appendonly is off: a restart of the broker loses jobs")
    if found.get("maxmemory-policy") != "noeviction":
        problems.append(f"maxmemory-policy is {found.get('maxmemory-policy')}: under pressure the broker drops records; set noeviction")
    if found.get("maxmemory") in (None, "0"):
        problems.append("maxmemory is not set: the broker may be killed for memory instead of refusing jobs")
    return problems


class Records:
    """What workers do with records, on a blocking client."""

    def __init__(self, client: redis.Redis, retention_s: int = 7 * 86400) -> None:
        self._client = client
        self._retention_s = retention_s
        self._wake_rank = 0  # where the next look for lost messages begins

    def get(self, job_id: str) -> JobRecord:
        return run(self._client, get(job_id))

    def models(self) -> dict[str, ModelInfo]:
        return run(self._client, models())

    def workers(self) -> list[str]:
        return run(self._client, workers())

    def durability(self) -> list[str]:
        return run(self._client, durability())

    def suspect(self, job_id: str) -> bool:
        """Whether so many workers were lost with this job that it should run with no other beside it."""
        crashes = self._one(lambda client: client.hget(routing.job_key(job_id), "crashes"))
        return int(crashes or 0) >= SUSPECT_CRASHES

    def claim(self, job_id: str, worker: str, lease_s: float, *, alone: bool = False) -> Claim | None:
        """Own the job for ``lease_s`` seconds; None when there is nothing to do for it.

        That is: it has ended, is past its deadline (then it is failed here), waits for its next try, or is under a live lease.

        Raises:
            JobNotFound: there is no such record, or it is of another version (then it is failed and kept as dead letter).
        """
        reply = self._eval(CLAIM, job_id, worker, lease_s, self._retention_s, int(alone))
        if reply == "unknown":
            raise JobNotFound(f"no job {job_id!r}: it never existed, or its retention time is over")
        if isinstance(reply, str):
            return None
        raw = _pairs(reply)
        token = int(raw["token"])
        try:
            return Claim(record=_record(raw), token=token)
        except JobNotFound as error:
            failure = JobError(code="unreadable_record", message="the record is of a version that this worker cannot read")
            self._eval(SETTLE, job_id, token, Status.FAILED.value, "[]", failure.model_dump_json(), "{}", self._retention_s)
            self.bury(job_id, "job", error.message, job_id=job_id, code=failure.code)
            raise

    def beat(self, beats: Sequence[Beat]) -> list[Verdict]:
        """Renew leases and store progress of many jobs in one round trip."""

        def call(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            for b in beats:
                previews = json.dumps(b.previews) if b.previews else ""
                pipeline.eval(BEAT, 0, b.job_id, b.token, b.phase.value, b.step, b.lease_s, b.batch_jobs, previews)
            return pipeline.execute()

        def operation() -> Operation[list[Verdict]]:
            replies = yield call
            return [Verdict(reply) for reply in replies]

        return run(self._client, operation())

    def checkpoint(self, job_id: str, token: int, step: int, data: bytes) -> bool:
        """Keep what another worker needs to go on from ``step`` (in the job's own steps); False for a stale token."""
        return bool(self._eval(CHECKPOINT, job_id, token, step, data, CHECKPOINT_TTL_S))

    def load_checkpoint(self, job_id: str) -> bytes | None:
        """The newest checkpoint of a job."""
        # The client decodes what it reads, and these are bytes: asked for as such.
        data: bytes | None = self._one(lambda client: client.execute_command("GET", routing.checkpoint_key(job_id), **{NEVER_DECODE: True}))
        return data

    def release(self, job_id: str, token: int) -> bool:
        """Back to the queue with a fresh wake-up, or cancelled if that was asked for; False when somebody else owns the job now."""
        return bool(self._eval(RELEASE, job_id, token, self._retention_s))

    def retry(self, job_id: str, token: int, error: JobError, delay_s: float) -> Status:
        """Another try after ``delay_s``, or failed and a dead letter after ``MAX_ERRORS``; the status that came of it.

        Raises:
            StaleToken: as :meth:`settle`.
        """
        status = self._eval(RETRY, job_id, token, error.model_dump_json(), delay_s, MAX_ERRORS, self._retention_s)
        if not status:
            raise StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
        return Status(status)

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
        failure = error.model_dump_json() if error else ""
        reply = self._eval(SETTLE, job_id, token, status.value, stored, failure, json.dumps(timings or {}), self._retention_s)
        if not reply:
            raise StaleToken(f"job {job_id}: token {token} is not the newest, or the job has ended")
        return _record(_pairs(reply))

    def reclaim(self) -> list[str]:
        """Take jobs away from workers whose lease has run out and queue them again; the ids of those jobs.

        A job that was alone on ``MAX_CRASHES_ALONE`` lost workers fails with ``worker_lost``: it is what kills them.
        """
        seconds = self._now()
        running = self._one(lambda client: client.zrange(routing.index_key(Status.RUNNING), 0, MAX_RECLAIM - 1))
        leases = self._one(_field_of(running, "lease_until"))
        reclaimed = []
        for job_id, lease in zip(running, leases, strict=True):
            if lease is None:
                self._one(_zrem(routing.index_key(Status.RUNNING), [job_id]))  # its record has expired
            elif float(lease) <= seconds and self._eval(RECLAIM, job_id, MAX_CRASHES_ALONE, self._retention_s):
                reclaimed.append(job_id)
        return reclaimed

    def wake(self, model: str, grace_s: float) -> list[str]:
        """Queue again what is due for its next try, and what has waited for ``grace_s`` while its message is lost; their ids.

        Each call looks at ``MAX_WAKE`` waiting jobs, the next call at the next ones.
        """
        woken, looked_at = self._eval(WAKE, model, grace_s, self._wake_rank, MAX_WAKE)
        self._wake_rank = self._wake_rank + MAX_WAKE if looked_at == MAX_WAKE else 0
        found: list[str] = woken
        return found

    def expired(self) -> list[str]:
        """Ended jobs whose retention is over, as ``tenant/id``; their records are gone after this, their images may not be."""
        members: list[str] = self._eval(EXPIRE, MAX_RECLAIM)
        return members

    def forget(self, members: Sequence[str]) -> None:
        """The images of these are gone as well."""
        self._one(_zrem(routing.expiring_key(), members))

    def take_callback(self, callback_id: str, lock_s: float) -> dict[str, Any] | None:
        """A due callback for one try within ``lock_s``; None when it is delivered, given up, not due yet, or in other hands."""
        reply = self._eval(TAKE_CALLBACK, callback_id, lock_s)
        return _callback(_pairs(reply)) if reply else None

    def settle_callback(self, callback_id: str, entry: dict[str, Any], status: str, delay_s: float = 0.0) -> None:
        """Log a try: ``pending`` and due again after ``delay_s``, or ended (delivered, failed, refused, gone)."""
        self._eval(SETTLE_CALLBACK, callback_id, json.dumps(entry), status, delay_s)

    def put_back_callback(self, callback_id: str, delay_s: float) -> None:
        """A callback that was taken and not tried: due again after ``delay_s``."""
        self._eval(PUT_BACK_CALLBACK, callback_id, delay_s)

    def wake_callbacks(self) -> int:
        """Hand every callback whose next try is due to the deliverers; how many."""
        return int(self._eval(WAKE_CALLBACKS, MAX_RECLAIM))

    def receiver_disabled(self, url: str) -> bool:
        """Whether this receiver has answered 410 Gone."""
        return bool(self._one(lambda client: client.hexists(routing.disabled_receivers_key(), url)))

    def bury(self, dead_id: str, kind: str, reason: str, **more: Any) -> None:
        """Keep what nobody can read, with its cause."""
        seconds = self._now()
        letter = json.dumps({"id": dead_id, "kind": kind, "reason": reason, "at": str(seconds), **more})
        self._one(lambda client: client.hsetnx(routing.dead_key(), dead_id, letter))

    def announce_model(self, info: ModelInfo) -> None:
        """Say that a worker serves this model."""
        self._one(lambda client: client.hset(routing.models_key(), info.id, info.model_dump_json()))

    def worker_beat(self, name: str) -> None:
        """Say that a worker is alive, on the server's clock."""
        seconds = self._now()
        self._one(lambda client: client.zadd(routing.workers_key(), {name: seconds}))

    def worker_gone(self, name: str) -> None:
        """Say that a worker has stopped."""
        self._one(lambda client: client.zrem(routing.workers_key(), name))

    def _now(self) -> float:
        """The server's clock."""
        seconds, microseconds = self._one(lambda client: client.time())
        return float(seconds + microseconds / 1e6)

    def _eval(self, script: str, *args: Any) -> Any:
        return self._one(lambda client: client.eval(script, 0, *args))

    def _one(self, call: Call) -> Any:
        def operation() -> Operation[Any]:
            return (yield call)

        return run(self._client, operation())


def _index_page(key: str, before: str, offset: int, count: int) -> Call:
    return lambda client: client.zrange(key, before, "-inf", desc=True, byscore=True, offset=offset, num=count, withscores=True)


def _zrem(key: str, members: Sequence[str]) -> Call:
    return lambda client: client.zrem(key, *members)


def _hgetall_many(ids: Sequence[str], key: Callable[[str], str] = routing.job_key) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for one in ids:
            pipeline.hgetall(key(one))
        return pipeline.execute()

    return call


def _field_of(job_ids: Sequence[str], field: str) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hget(routing.job_key(job_id), field)
        return pipeline.execute()

    return call


def _callback(raw: dict[str, str]) -> dict[str, Any]:
    """A callback's hash with its numbers and its log read."""
    try:
        record = _record(_pairs(json.loads(raw["record"])))
    except JobNotFound:  # of another version: the list of callbacks must not break on it, and it must not come back for ever
        record = None
    return {
        **{key: raw[key] for key in ("id", "job_id", "type", "url", "status")},
        "seq": int(raw["seq"]),
        "tries": int(raw["tries"]),
        "at": float(raw["at"]),
        "due": float(raw["due"]),
        "log": json.loads(raw.get("log") or "[]"),
        "record": record,
    }


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
    "Beat", "Operation", "Records", "Verdict", "arun", "callbacks", "cancel", "dead_letter", "dead_letters", "drop_dead_letter",
    "durability", "events", "get", "list_jobs", "models", "replay_callback", "run", "submit", "workers",
]  # fmt: skip
