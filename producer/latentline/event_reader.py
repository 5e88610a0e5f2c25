"""Many listeners to the events of many jobs, on one connection to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import redis.asyncio

from . import records
from .errors import BrokerUnavailable, JobNotFound, LatentlineError
from .jobs import JobEvent
from .records import arun

log = logging.getLogger(__name__)

BLOCK_MS = 1500  # how long one read waits; below every socket timeout
GATHER_S = 0.02  # between two reads, so that events that come close together cost one read
CHECK_S = 15.0  # how often it is checked whether the jobs' records are still there

Batch = list[JobEvent] | LatentlineError


class Listener:
    """One follower of one job. Made by :meth:`EventReader.listen`."""

    def __init__(self) -> None:
        self.ended = False
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()  # bounded by the length of a job's stream
        self._early: list[Batch] | None = []  # what the shared read brought before this listener's own first read ended
        self._last = (0, 0)

    async def next(self, timeout_s: float) -> Sequence[JobEvent]:
        """The next events; none if none comes within ``timeout_s``. After the job's last event, ``ended`` is set.

        Raises:
            BrokerUnavailable: the broker does not answer.
            JobNotFound: the record is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                batch = await self._batches.get()
        except TimeoutError:
            return []
        if isinstance(batch, LatentlineError):
            raise batch
        # What the first read of this listener had may come again from the shared one.
        found = [event for event in batch if _order(event.id) > self._last]
        if found:
            self._last = _order(found[-1].id)
        self.ended = self.ended or any(event.terminal for event in found)
        return found

    def put(self, batch: Batch) -> None:
        """Hand on what the shared read has brought."""
        if self._early is None:
            self._batches.put_nowait(batch)
        else:
            self._early.append(batch)

    def begin(self, first: list[JobEvent], ended: bool) -> None:
        """Hand on what this listener's own first read has brought; what came meanwhile follows behind it."""
        early, self._early = self._early or [], None
        for batch in (first, *early):
            self._batches.put_nowait(batch)
        self.ended = ended and not first


@dataclass(eq=False)
class _Job:
    """A job that somebody listens to."""

    last: str | None = None  # id of the last event that was read; None until the first listener has read what there was
    listeners: set[Listener] = field(default_factory=set)


class EventReader:
    """Reads the streams of all jobs that anybody listens to in one blocking call, and hands the events on.

    A blocked read cannot be given more streams. So one of its streams is a bell, which a new listener rings from another
    connection; it is read from its last event on, so no ring is missed. Reading goes on while there are listeners.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._jobs: dict[str, _Job] = {}
        self._bell = f"bell-{uuid.uuid4().hex}"
        self._rung = records.START  # id of the last ring that was heard
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def listen(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Listener]:
        """Follow a job from after ``last_event_id``, its first event by default.

        Raises:
            JobNotFound: there is no such record.
            InvalidRequest: the id is not that of an event.
        """
        listener = Listener()
        job = self._jobs.setdefault(job_id, _Job())
        job.listeners.add(listener)  # before the read below: an event that comes between them is not missed
        try:
            found, ended = await arun(self._client, records.follow(job_id, last_event_id, None))
            listener.begin(found, ended)
            if job.last is None:
                job.last = found[-1].id if found else last_event_id or records.START
            if not ended:
                await self._include()
            yield listener
        finally:
            job.listeners.discard(listener)
            if not job.listeners and self._jobs.get(job_id) is job:
                del self._jobs[job_id]

    async def close(self) -> None:
        """Stop reading; listeners get no more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

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
                found = await arun(self._client, records.read_streams({**after, self._bell: self._rung}, BLOCK_MS))
                if rings := found.pop(self._bell, None):
                    self._rung = rings[-1].id
                for job_id, events in found.items():
                    self._hand_on(job_id, events)
                if time.monotonic() - checked > CHECK_S:
                    checked = time.monotonic()
                    for job_id in await arun(self._client, records.gone(after)):
                        self._fail(job_id, JobNotFound(f"no job {job_id!r}: its retention time is over"))
                await asyncio.sleep(GATHER_S)
        except LatentlineError as error:
            self._fail_all(error)
        except Exception:
            log.exception("reading events failed")
            self._fail_all(BrokerUnavailable("the events cannot be read"))

    def _hand_on(self, job_id: str, events: list[JobEvent]) -> None:
        if events and (job := self._jobs.get(job_id)):
            job.last = events[-1].id
            for listener in job.listeners:
                listener.put(events)

    def _fail(self, job_id: str, error: LatentlineError) -> None:
        """Tell the listeners of a job that no more comes. Those that come later begin anew."""
        if job := self._jobs.pop(job_id, None):
            for listener in job.listeners:
                listener.put(error)

    def _fail_all(self, error: LatentlineError) -> None:
        for job_id in list(self._jobs):
            self._fail(job_id, error)


def _order(event_id: str) -> tuple[int, int]:
    """An event's id as numbers: they sort in the order of the stream."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)
