"""Many listeners to the events of many jobs, on one connection to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import redis.asyncio

from . import records
from .errors import BrokerUnavailable, JobNotFound, LatentlineError
from .jobs import JobEvent, JobRecord, Status
from .listener import POSITION, Batch, Listener, in_order
from .records import Operation, arun

log = logging.getLogger(__name__)

BLOCK_MS = 1500  # how long one read waits; below every socket timeout
GATHER_S = 0.02  # between two reads, so that events that come close together cost one read
GATHER_PER_JOB_S = 50e-6  # and more with each job that is read: one read of 2,000 streams takes some milliseconds
CHECK_S = 15.0  # how often it is checked whether the jobs' records are still there
FIRST_READS = 4  # at once; each takes a connection of its own while it lasts


@dataclass(eq=False)
class _Job:
    """A job that somebody listens to."""

    last: str | None = None  # id of the last event that was read; None until the first listener has read what there was
    record: JobRecord | None = None  # as the last first read had it, without its texts, with what its events have told since
    listeners: set[Listener] = field(default_factory=set)


class EventReader:
    """Reads the streams of all jobs that anybody listens to in one blocking call, and hands the events on.

    A blocked read cannot be given more streams. So one of its streams is a bell, which a new listener rings from another
    connection; it is read from its last event on, so no ring is missed. Reading goes on while there are listeners.

    Args:
        with_urls: gives a record whose images have URLs, for the events of jobs that succeeded.
    """

    def __init__(self, client: redis.asyncio.Redis, with_urls: Callable[[JobRecord], JobRecord] = lambda record: record) -> None:
        self._client, self._with_urls = client, with_urls
        self._jobs: dict[str, _Job] = {}
        self._bell = f"bell-{uuid.uuid4().hex}"
        self._rung = records.START  # id of the last ring that was heard
        self._task: asyncio.Task[None] | None = None
        self._first_reads = asyncio.Semaphore(FIRST_READS)

    @contextlib.asynccontextmanager
    async def listen(
        self,
        after: Mapping[str, str | None],
        sees: Callable[[JobRecord], bool] = lambda record: True,
        *,
        many: bool = False,
        places: bool = False,
    ) -> AsyncIterator[Listener]:
        """Follow jobs, each from after the event with the given id, from its first event where that is None.

        Args:
            sees: which of the jobs the listener may see; the others are as if they did not exist.
            many: one job that is not there, or goes, is told as an event and ends nothing.
            places: places in the queue are told as events.

        Raises:
            JobNotFound: none of the jobs exists.
            InvalidRequest: an id is not that of an event.
        """
        listener = Listener(many, places)
        try:
            if not await self.add(listener, after, sees) and after:
                raise records.not_found(next(iter(after)))
            yield listener
        finally:
            self._leave(listener)

    async def add(
        self, listener: Listener, after: Mapping[str, str | None], sees: Callable[[JobRecord], bool] = lambda record: True
    ) -> int:
        """Have a listener follow further jobs, and tell how many of them are there; see :meth:`listen`."""
        for job_id in after:  # before the read below: an event that comes between them is not missed
            listener.expect(job_id)
            self._jobs.setdefault(job_id, _Job()).listeners.add(listener)
        async with self._first_reads:
            found = await arun(self._client, records.follow_many(after))
        first: list[JobEvent] = []
        ended, unknown = [], []
        for job_id, (record, events) in found.items():
            if record is None or not sees(record):
                unknown.append(job_id)
                continue
            events = self._completed(events, {job_id: record})
            first += events
            if record.status.terminal:
                ended.append(job_id)
            self._start(job_id, events, after[job_id], listener)
            if job := self._jobs.get(job_id):
                job.record = _without_texts(record)
            if listener.places and record.status is Status.QUEUED and record.queue_position is not None:
                first.append(_position(job_id, record.queue_position))
        listener.begin(after, Batch(in_order(first), ended, unknown))
        for job_id in (*unknown, *ended):
            self._leave_job(listener, job_id)
        if len(ended) + len(unknown) < len(after):
            await self._include()
        return len(after) - len(unknown)

    async def close(self) -> None:
        """Stop reading; listeners get no more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def reading(self) -> bool:
        """Whether anybody listens to a job."""
        return bool(self._jobs)

    def record(self, job_id: str) -> JobRecord | None:
        """A job that somebody listens to, as it was read, with the status, step and place that its events have told since."""
        job = self._jobs.get(job_id)
        return job.record if job else None

    def waiting(self) -> list[JobRecord]:
        """Those of the jobs that wait."""
        return [job.record for job in self._jobs.values() if job.record and job.record.status is Status.QUEUED]

    def moved(self, job_id: str, place: int) -> None:
        """Tell the listeners of a job its new place in the queue."""
        job = self._jobs.get(job_id)
        if job and job.record:
            job.record = job.record.model_copy(update={"queue_position": place})
            for listener in job.listeners:
                if listener.places:
                    listener.put(job_id, Batch([_position(job_id, place)]))

    def _start(self, job_id: str, events: list[JobEvent], after: str | None, listener: Listener) -> None:
        """Set where the shared read begins, once the first listener of a job has read what there was."""
        job = self._jobs.get(job_id)
        if job is None or job.last is not None:
            return
        job.last = events[-1].id if events else after or records.START
        # The shared read leaves these out, and the first read of another listener may have been made before they came.
        for other in job.listeners - {listener}:
            other.put(job_id, Batch(events))

    def _completed(self, events: Iterable[JobEvent], ended: Mapping[str, JobRecord]) -> list[JobEvent]:
        """The events; those of jobs that have succeeded with their images."""
        return [
            event.model_copy(update={"data": {**event.data, "images": _images(self._with_urls(ended[event.job_id]))}})
            if event.type == "job.succeeded" and event.job_id in ended
            else event
            for event in events
        ]

    def _leave(self, listener: Listener) -> None:
        for job_id in listener.jobs:
            self._leave_job(listener, job_id)

    def _leave_job(self, listener: Listener, job_id: str) -> None:
        if job := self._jobs.get(job_id):
            job.listeners.discard(listener)
            if not job.listeners:
                del self._jobs[job_id]

    async def _include(self) -> None:
        """See that the reading includes a job that has just come."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read(), name="events")
        else:
            await arun(self._client, records.ring(self._bell))

    async def _read(self) -> None:
        checked = time.monotonic()
        try:
            while after := {job_id: job.last for job_id, job in self._jobs.items() if job.last is not None}:
                found = await arun(self._client, self._next({**after, self._bell: self._rung}))
                for job_id, events in found.items():
                    self._hand_on(job_id, events)
                if time.monotonic() - checked > CHECK_S:
                    checked = time.monotonic()
                    for job_id in await arun(self._client, records.gone(after)):
                        self._fail(job_id, JobNotFound(f"no job {job_id!r}: its retention time is over, or it was deleted"))
                await asyncio.sleep(GATHER_S + GATHER_PER_JOB_S * len(after))
        except LatentlineError as error:
            self._fail_all(error)
        except Exception:
            log.exception("reading events failed")
            self._fail_all(BrokerUnavailable("the events cannot be read"))

    def _next(self, after: Mapping[str, str]) -> Operation[dict[str, list[JobEvent]]]:
        """The new events of all jobs, those of jobs that have succeeded with their images."""
        found = yield from records.read_streams(after, BLOCK_MS)
        if rings := found.pop(self._bell, None):
            self._rung = rings[-1].id
        succeeded = [job_id for job_id, events in found.items() if any(event.type == "job.succeeded" for event in events)]
        if succeeded:
            there = yield from records.get_many(succeeded)
            for job_id in succeeded:
                found[job_id] = self._completed(found[job_id], there)
        return found

    def _hand_on(self, job_id: str, events: Sequence[JobEvent]) -> None:
        if events and (job := self._jobs.get(job_id)):
            job.last = events[-1].id
            if job.record:
                job.record = job.record.model_copy(update=_told(events))
            ended = [job_id] if any(event.terminal for event in events) else []
            if ended:
                del self._jobs[job_id]  # nothing more comes
            for listener in job.listeners:
                listener.put(job_id, Batch(events, ended))

    def _fail(self, job_id: str, error: LatentlineError) -> None:
        """Tell the listeners of a job that no more comes. Those that come later begin anew."""
        if job := self._jobs.pop(job_id, None):
            for listener in job.listeners:
                if isinstance(error, JobNotFound) and listener.many:
                    listener.put(job_id, Batch((), unknown=[job_id]))
                else:
                    listener.fail(error)

    def _fail_all(self, error: LatentlineError) -> None:
        for job_id in list(self._jobs):
            self._fail(job_id, error)


def _position(job_id: str, place: int) -> JobEvent:
    return JobEvent(id="", type=POSITION, job_id=job_id, at=time.time(), data={"queue_position": place})


def _without_texts(record: JobRecord) -> JobRecord:
    """A record without what may be long and is not needed while its job is listened to."""
    return record.model_copy(update={"request": record.request.model_copy(update={"prompt": "", "negative_prompt": "", "metadata": {}})})


def _told(events: Sequence[JobEvent]) -> dict[str, object]:
    """What events tell of their job: whether it waits or runs, and its step."""
    update: dict[str, object] = {}
    for event in events:
        if event.type in ("job.queued", "job.running"):
            update["status"] = Status.QUEUED if event.type == "job.queued" else Status.RUNNING
            update["queue_position"] = None
        if isinstance(step := event.data.get("step"), int):
            update["step"] = step
    return update


def _images(record: JobRecord) -> list[dict[str, object]]:
    return [image.model_dump(mode="json") for image in record.images]
