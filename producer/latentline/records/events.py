"""What applications read of jobs as they run: their event streams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from latentline import routing
from latentline.errors import InvalidRequest, JobNotFound
from latentline.jobs import JobEvent, JobRecord
from latentline.scripts import POSITIONS, VIEW

from .driving import Operation, call_script_many
from .jobs import get, viewed

START = "0-0"  # before the first event of any stream
MAX_READ = 200  # events of one stream in one read


def events(job_id: str, last_event_id: str | None = None, block_ms: int | None = None) -> Operation[list[JobEvent]]:
    """The events after ``last_event_id``; waits up to ``block_ms`` for the first.

    Only the newest preview of a job is kept, for an hour at most and not past the end of the job. ``job.preview`` events whose
    picture is gone are left out, except for the last event that was read, which comes without images: its id is where the
    next read continues.
    """
    exists = yield lambda client: client.exists(routing.job_key(job_id))
    if not exists:
        raise JobNotFound(f"no job {job_id!r}: it never existed, or its retention time is over")
    return (yield from _after(job_id, last_event_id, block_ms))


def follow_many(after: Mapping[str, str | None]) -> Operation[dict[str, tuple[JobRecord | None, list[JobEvent]]]]:
    """The records of many jobs, and their events after the given ids, in one round trip; None for a record that is not there.

    Raises:
        InvalidRequest: an id that is not of the form of an event's.
    """
    if not after:
        return {}
    ids = [_checked(last) for last in after.values()]
    read = ["XREAD", "STREAMS", *(routing.events_key(job_id) for job_id in after), *ids]
    # The records are read first: a job that ends between the two then still has its last event in the read.
    *replies, reply = yield from call_script_many(VIEW, [{"id": job_id} for job_id in after], [read])
    events = yield from _by_job(reply)
    found: dict[str, tuple[JobRecord | None, list[JobEvent]]] = {}
    for job_id, view in zip(after, replies, strict=True):
        try:
            found[job_id] = (yield from viewed(job_id, view)), events.get(job_id, [])
        except JobNotFound:
            found[job_id] = None, []
    return found


def follow(job_id: str, last_event_id: str | None, block_ms: int | None) -> Operation[tuple[list[JobEvent], bool]]:
    """One read of a job's events, and whether nothing more can come."""
    # Asked first: a job that ends between the two calls then still has its last event in the read.
    ended = (yield from get(job_id)).status.terminal
    found = yield from _after(job_id, last_event_id, None if ended else block_ms)
    return found, ended or any(event.terminal for event in found)


def _after(job_id: str, last_event_id: str | None, block_ms: int | None) -> Operation[list[JobEvent]]:
    """The new events of one job that exists; raises InvalidRequest for an id of another form."""
    return (yield from read_streams({job_id: _checked(last_event_id)}, block_ms)).get(job_id, [])


def _checked(last_event_id: str | None) -> str:
    """Where a read begins; raises InvalidRequest for an id of another form."""
    after = last_event_id or START
    parts = after.split("-")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise InvalidRequest("last_event_id", last_event_id, "an id that this stream gave, such as 1700000000000-0")
    return after


def read_streams(after: Mapping[str, str], block_ms: int | None = None) -> Operation[dict[str, list[JobEvent]]]:
    """The new events of many jobs in one read; waits up to ``block_ms`` for the first of any.

    Args:
        after: job id -> id of the last event that is known.

    Returns:
        job id -> its new events, for those that have any.
    """
    streams: dict[str, str] = {routing.events_key(job_id): last for job_id, last in after.items()}
    return (yield from _by_job((yield lambda client: client.xread(streams, count=None if block_ms is None else MAX_READ, block=block_ms))))


def _by_job(reply: Any) -> Operation[dict[str, list[JobEvent]]]:
    """The events of each job in a reply of XREAD."""
    found: dict[str, list[JobEvent]] = {}
    for key, entries in reply.items() if isinstance(reply, dict) else reply or []:
        job_id = key.removeprefix(routing.events_key(""))
        found[job_id] = yield from _with_preview(job_id, [_event(job_id, *entry) for entry in _flat(entries)])
    return found


def positions(models: Mapping[str, str]) -> Operation[dict[str, int | None]]:
    """The places in the queue of jobs that wait, 0 for the next one; None for one that does not wait.

    Args:
        models: job id -> its model.
    """
    (places,) = yield from call_script_many(POSITIONS, [{"jobs": json.dumps(list(models.items()))}])
    return {job_id: None if place < 0 else place for job_id, place in zip(models, places, strict=True)}


def ring(bell: str) -> Operation[None]:
    """Add an event to a stream that is no job's, which ends the wait of a :func:`read_streams` that reads it too."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.xadd(routing.events_key(bell), {"type": "bell", "at": "0"}, maxlen=1)
        pipeline.expire(routing.events_key(bell), 60)
        return pipeline.execute()

    yield call


def gone(job_ids: Iterable[str]) -> Operation[list[str]]:
    """Those of these jobs whose records are gone."""
    asked = list(job_ids)

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for job_id in asked:
            pipeline.exists(routing.job_key(job_id))
        return pipeline.execute()

    found = yield call
    return [job_id for job_id, exists in zip(asked, found, strict=True) if not exists]


def _flat(entries: list[Any]) -> list[Any]:
    """The entries of one stream; some clients group them in batches."""
    return entries if not entries or isinstance(entries[0], tuple) else [entry for batch in entries for entry in batch]


def _event(job_id: str, event_id: str, fields: Mapping[str, str]) -> JobEvent:
    data = json.loads(fields.get("data") or "{}")
    return JobEvent(id=event_id, type=fields["type"], job_id=job_id, at=float(fields["at"]), data=data)


def _with_preview(job_id: str, found: list[JobEvent]) -> Operation[list[JobEvent]]:
    """The newest preview's event with its images, without the events of earlier previews.

    The last event is kept in any case, then without images: readers continue after its id.
    """
    without = {event.id for event in found if event.type == "job.preview" and not event.data.get("images")}
    if not without:  # workers of version 0.1.0 write the images into the stream
        return found
    seq, data = yield lambda client: client.hmget(routing.preview_key(job_id), "seq", "data")
    kept = []
    for event in found:
        if event.id in without and str(event.data.get("seq")) == seq:
            kept.append(event.model_copy(update={"data": json.loads(data)}))
        elif event.id not in without or event is found[-1]:
            kept.append(event)
    return kept
