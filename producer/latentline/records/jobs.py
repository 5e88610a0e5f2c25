"""What applications do with jobs: submit, get, list, cancel, delete."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from latentline import routing
from latentline.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    JobNotEnded,
    JobNotFound,
    LatentlineError,
    TenantQuotaExceeded,
)
from latentline.jobs import (
    DEFAULT_RETENTION_S,
    JobRecord,
    Status,
    Submission,
)
from latentline.keys import ApiKey
from latentline.scripts import CANCEL, DELETE, END_IF_OVERDUE, POLL, SUBMIT, VIEW

from .driving import Operation, call_script, call_script_many, hgetall_many, pairs, unavailable
from .keys import key_of
from .stored import record_of

AOF_TIMEOUT_MS = 2000


def submit(
    submissions: Sequence[Submission], retention_s: int, *, tenant_cap: int = 0, max_jobs: int = 0, durable: bool = False
) -> Operation[list[JobRecord | LatentlineError]]:
    """Write records, wake-ups, indexes and events of all submissions in one pipeline, each atomically.

    Args:
        submissions: from :meth:`latentline.records.Fleet.accept`.
        retention_s: how long a job with a deadline is kept if a reader ends it; a worker that ends a job uses its own setting.
        tenant_cap: rows of denoising that one tenant may have queued and running; 0 for no bound. One job always fits.
        max_jobs: jobs that one tenant may have queued and running; 0 for no bound.
        durable: return only when the append-only file holds them (WAITAOF).

    Returns:
        for each submission, in order, the record or the error with which it was refused.

    Raises:
        BrokerUnavailable: also when ``durable`` was asked for and the file is not written in time; the jobs may still run.
    """
    # WAITAOF counts what its own connection has written, so it follows in the same pipeline.
    last = [("WAITAOF", 1, 0, AOF_TIMEOUT_MS)] if durable else []
    calls = [_arguments(one, retention_s, tenant_cap, max_jobs) for one in submissions]
    replies = yield from call_script_many(SUBMIT, calls, last, keep_errors=True)
    if durable:
        _check_written(replies.pop())
    outcomes: list[JobRecord | LatentlineError] = []
    for one, reply in zip(submissions, replies, strict=True):
        try:
            outcomes.append((yield from _accepted(one, reply, tenant_cap)))
        except LatentlineError as error:
            outcomes.append(error)
        except redis.ResponseError as error:  # the other jobs of the pipeline may be accepted: their ids must not be lost
            outcomes.append(unavailable(error))
    return outcomes


def _check_written(reply: Any) -> None:
    """Raise BrokerUnavailable unless WAITAOF says that the append-only file holds the jobs."""
    if isinstance(reply, redis.ResponseError) and "replica" in str(reply):
        raise BrokerUnavailable("the broker is a replica: it takes no jobs") from reply
    if isinstance(reply, redis.ResponseError) and "WAITAOF" in str(reply):
        raise BrokerUnavailable("the broker has no append-only file, and durable jobs were asked for: set appendonly yes") from reply
    if isinstance(reply, redis.ResponseError):
        raise reply
    if not reply[0]:
        raise BrokerUnavailable(f"the broker has not written its append-only file within {AOF_TIMEOUT_MS} ms; the jobs may still run")


def _accepted(one: Submission, reply: Any, tenant_cap: int) -> Operation[JobRecord]:
    """The record that came of one submission; raises the error with which it was refused."""
    if isinstance(reply, redis.ResponseError):
        raise reply
    (outcome, payload, *position), request = reply, one.request
    if outcome == "conflict":
        raise IdempotencyConflict(f"idempotency key {request.idempotency_key!r} was used with another request (job {payload})")
    if outcome == "full":
        raise TenantQuotaExceeded(
            f"tenant {request.tenant!r} has {payload} rows queued and running: {one.cost} more exceed the {tenant_cap} allowed"
        )
    if outcome == "busy":
        raise TenantQuotaExceeded(f"tenant {request.tenant!r} has {payload} jobs queued and running, as many as are allowed")
    if outcome == "same":
        return (yield from get(payload))
    return record_of(pairs(payload)).model_copy(update={"queue_position": position[0]})


def get(job_id: str) -> Operation[JobRecord]:
    """One record; raises JobNotFound. A queued one that is past its deadline is failed first: there may be no worker to do it."""
    return (yield from viewed(job_id, (yield from call_script(VIEW, id=job_id))))


def get_with_key(job_id: str, prefix: str) -> Operation[tuple[JobRecord | JobNotFound, ApiKey | None]]:
    """A job, and the API key with this prefix, in the one round trip that the job alone takes."""
    reply, flat = yield from call_script(POLL, id=job_id, prefix=prefix)  # a pipeline of two would cost the API a tenth more CPU
    key = key_of(pairs(flat))
    try:
        return (yield from viewed(job_id, reply)), key
    except JobNotFound as error:
        return error, key


def get_many(job_ids: Sequence[str]) -> Operation[dict[str, JobRecord]]:
    """The records of many jobs, those that are there and can be read, in one round trip."""
    found: dict[str, JobRecord] = {}
    for raw in (yield hgetall_many(job_ids)):
        with contextlib.suppress(JobNotFound):
            record = record_of(raw)
            found[record.id] = record
    return found


def not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"no job {job_id[:80]!r}: it never existed, or its retention time is over")


def viewed(job_id: str, reply: Any) -> Operation[JobRecord]:
    """The record that view.lua gave."""
    now, flat, position = reply
    if not flat:
        raise not_found(job_id)
    (raw,) = yield from end_overdue([pairs(flat)], float(now))
    record = record_of(raw)
    return record.model_copy(update={"queue_position": position}) if record.status is Status.QUEUED else record


def cancel(job_id: str, retention_s: int) -> Operation[JobRecord]:
    """Cancel at once when queued, at the next step when running; a terminal job stays as it is."""
    yield from get(job_id)  # raises for an unknown one
    yield from call_script(CANCEL, id=job_id, retention_s=retention_s)
    return (yield from get(job_id))


def delete(job_id: str) -> Operation[None]:
    """Forget a job that has ended: its record at once, its pictures with the next turn of any worker, within seconds.

    Raises:
        JobNotFound: there is none.
        JobNotEnded: it is queued or running.
    """
    outcome = yield from call_script(DELETE, id=job_id)
    if outcome == "unknown":
        raise not_found(job_id)
    if outcome != "deleted":
        raise JobNotEnded(f"job {job_id[:80]!r} is {outcome}: cancel it first")


def _arguments(one: Submission, retention_s: int, tenant_cap: int, max_jobs: int) -> dict[str, Any]:
    """The arguments of submit.lua for one request."""
    request = one.request
    callback = request.callback
    return {
        "id": str(uuid.uuid4()),
        "request": request.to_json(),
        "num_steps": request.num_inference_steps,
        "model": request.model,
        "tenant": request.tenant,
        "priority": request.priority,
        "priority_step": routing.priority_step(request.priority),
        "deadline_s": request.deadline_s or 0,
        "cost": one.cost,
        "cap": tenant_cap,
        "max_jobs": max_jobs,
        "idempotency_key": request.idempotency_key or "",
        "fingerprint": one.fingerprint if request.idempotency_key else "",
        "sized_fingerprint": one.sized_fingerprint if request.idempotency_key else "",
        "retention_s": retention_s,
        "callback_url": callback.url if callback else "",
        "callback_events": json.dumps(callback.events) if callback else "",
        "queue_prefix": routing.queue_prefix(request.model, one.level),
        "level": one.level,
        "labels": labels(request.metadata),
        "digest": one.sending.digest if one.sending else "",
        "sending": one.sending.count if one.sending else 0,
        "traceparent": one.traceparent,
    }


def labels(metadata: Mapping[str, Any]) -> str:
    """Metadata as page.lua looks for it: each entry as ``"key:value"`` in a line of its own; empty without any."""
    lines = [label(f"{key}:{value if isinstance(value, str) else json.dumps(value)}") for key, value in metadata.items()]
    return "\n".join(["", *lines, ""]) if lines else ""


def label(text: str) -> str:
    """One entry, ``key:value``, without line ends in it. Values that are not text are written as in JSON."""
    return json.dumps(text)


def end_overdue(raws: list[dict[str, str]], now: float) -> Operation[list[dict[str, str]]]:
    """The records, after those of them that are queued past their deadline were failed."""
    dated = [raw for raw in raws if raw.get("status") == Status.QUEUED and "deadline_at" in raw]
    overdue = [raw["id"] for raw in dated if float(raw["deadline_at"]) <= now]
    if not overdue:
        return raws
    # The default counts for jobs of clients of version 0.1.0, which do not store their retention.
    calls = [{"id": job_id, "default_retention_s": DEFAULT_RETENTION_S} for job_id in overdue]
    try:
        yield from call_script_many(END_IF_OVERDUE, calls)
    except redis.ResponseError:
        return raws  # a broker that takes no writes now can still be read
    again = yield hgetall_many(overdue)
    ended = {job_id: raw for job_id, raw in zip(overdue, again, strict=True) if raw}
    return [ended.get(raw["id"], raw) for raw in raws]
