"""Many listeners to the events of many jobs, on one connection to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

import redis.asyncio

from . import records
from .errors import BrokerUnavailable, JobNotFound, LatentlineError
from .followed import Followed, position
from .jobs import JobEvent, JobRecord, Status
from .listener import Batch, Listener, in_order
from .records import Operation, arun

log = logging.getLogger(__name__)

BLOCK_MS = 1500  # how long one read waits; below every socket timeout
GATHER_S = 0.02  # between two reads, so that events that come close together cost one read
GATHER_PER_JOB_S = 50e-6  # and more with each job that is read: one read of 2,000 streams takes some milliseconds
CHECK_S = 15.0  # how often it is checked whether the jobs' records are still there
OUTAGE_S = 60.0  # for which streams wait for a broker that does not answer
AGAIN_S = 1.0  # between two tries to reach it
FIRST_READS = 4  # at once; each takes a connection of its own while it lasts


class EventReader:
    """Reads the streams of all jobs that anybody listens to in one blocking call, and hands the events on.

    A blocked read cannot be given more streams. So one of its streams is a bell, which a new listener rings from another
    connection; it is read from its last event on, so no ring is missed. Reading goes on while there are listeners.

    Args:
        with_urls: gives a record whose images have URLs, for the events of jobs that succeeded.
    """

    outage_s = OUTAGE_S

    def __init__(self, client: redis.asyncio.Redis, with_urls: Callable[[JobRecord], JobRecord] = lambda record: record) -> None:
        self._client, self._with_urls = client, with_urls
        self.jobs = Followed()
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
        stream: bool = False,
    ) -> AsyncIterator[Listener]:
        """Follow jobs, each from after the event with the given id, from its first event where that is None.

        Args:
            sees: which of the jobs the listener may see; the others are as if they did not exist.
            many: one job that is not there, or goes, is told as an event and ends nothing.
            stream: places in the queue are told as events, and an outage of the broker is waited out, ``OUTAGE_S`` at most.

        Raises:
            BrokerUnavailable: the broker does not answer now.
            JobNotFound: none of the jobs exists.
            InvalidRequest: an id is not that of an event.
        """
        listener = Listener(many, stream)
        try:
            if not await self.add(listener, after, sees) and after:
                raise records.not_found(next(iter(after)))
            yield listener
        finally:
            self.jobs.leave(listener)

    async def add(
        self, listener: Listener, after: Mapping[str, str | None], sees: Callable[[JobRecord], bool] = lambda record: True
    ) -> int:
        """Have a listener follow further jobs, and tell how many of them are there; see :meth:`listen`."""
        for job_id in after:  # before the read below: an event that comes between them is not missed
            listener.expect(job_id)
            self.jobs.join(job_id, listener)
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
            self.jobs.begin(record, events, after[job_id], listener)
            if listener.stream and record.status is Status.QUEUED and record.queue_position is not None:
                first.append(position(job_id, record.queue_position))
        listener.begin(after, Batch(in_order(first), ended, unknown))
        for job_id in (*unknown, *ended):
            self.jobs.leave_job(listener, job_id)
        if len(ended) + len(unknown) < len(after):
            await self._include()
        return len(after) - len(unknown)

    async def close(self) -> None:
        """Stop reading; listeners get no more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _completed(self, events: Iterable[JobEvent], ended: Mapping[str, JobRecord]) -> list[JobEvent]:
        """The events; those of jobs that have succeeded with their images."""
        return [
            event.model_copy(update={"data": {**event.data, "images": _images(self._with_urls(ended[event.job_id]))}})
            if event.type == "job.succeeded" and event.job_id in ended
            else event
            for event in events
        ]

    async def _include(self) -> None:
        """See that the reading includes a job that has just come."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read(), name="events")
            return
        with contextlib.suppress(BrokerUnavailable):  # then the read that waits has failed too, and the next one includes the job
            await arun(self._client, records.ring(self._bell))

    async def _read(self) -> None:
        checked = answered = time.monotonic()
        try:
            while after := self.jobs.after():
                try:
                    for job_id, events in (await arun(self._client, self._next({**after, self._bell: self._rung}))).items():
                        self.jobs.hand_on(job_id, events)
                    if time.monotonic() - checked > CHECK_S:
                        checked = time.monotonic()
                        await self._check(after)
                except BrokerUnavailable as error:
                    # What was not handed on is read again: each read goes on from the last event that was.
                    if time.monotonic() - answered > self.outage_s:
                        raise
                    self.jobs.fail_impatient(error)
                    await asyncio.sleep(AGAIN_S)
                    continue
                answered = time.monotonic()
                await asyncio.sleep(GATHER_S + GATHER_PER_JOB_S * len(after))
        except LatentlineError as error:
            self.jobs.fail_all(error)
        except Exception:
            log.exception("reading events failed")
            self.jobs.fail_all(BrokerUnavailable("the events cannot be read"))

    async def _check(self, job_ids: Iterable[str]) -> None:
        """End the jobs whose records are gone."""
        for job_id in await arun(self._client, records.gone(job_ids)):
            self.jobs.fail(job_id, JobNotFound(f"no job {job_id!r}: its retention time is over, or it was deleted"))

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


def _images(record: JobRecord) -> list[dict[str, object]]:
    return [image.model_dump(mode="json") for image in record.images]
