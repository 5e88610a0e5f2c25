"""One follower of the events of one or many jobs. It puts together its own first read and what a shared read brings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import LatentlineError
from .jobs import JobEvent

POSITION = "job.position"  # the type of the event that tells of a place in the queue; it is in no stream and has no id
GONE = "job.gone"  # the type of the event that tells of a job that is not there


@dataclass(frozen=True)
class Batch:
    """Events, the jobs that have ended with them, and the jobs that are not there."""

    events: Sequence[JobEvent]
    ended: Sequence[str] = ()
    unknown: Sequence[str] = ()


class Listener:
    """Made by :meth:`latentline.event_reader.EventReader.listen`.

    Args:
        many: jobs that are not there are told as events.
        stream: places in the queue are told as events, and an outage of the broker is waited out.
    """

    def __init__(self, many: bool = False, stream: bool = False) -> None:
        self.many, self.stream = many, stream
        self._batches: asyncio.Queue[Batch | LatentlineError] = asyncio.Queue()  # bounded by the lengths of the jobs' streams
        self._early: dict[str, list[Batch]] = {}  # what the shared read brought before this listener's own first read ended
        self._last: dict[str, tuple[int, int]] = {}  # job -> id of the last event that was given
        self._open: set[str] = set()  # jobs of which more may come

    @property
    def ended(self) -> bool:
        """Whether the last event of every job was given."""
        return not self._open

    @property
    def jobs(self) -> Sequence[str]:
        """Every job that it follows or has followed."""
        return list(self._last)

    def is_open(self, job_id: str) -> bool:
        """Whether more of a job may come."""
        return job_id in self._open

    async def next(self, timeout_s: float) -> Sequence[JobEvent]:
        """The next events; none if none comes within ``timeout_s``. After the last event of every job, ``ended`` is set.

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
        found = []
        for event in batch.events:
            # What the first read of this listener had may come again from the shared one.
            if event.type == POSITION:
                found.append(event)
            elif _order(event.id) > self._last[event.job_id]:
                self._last[event.job_id] = _order(event.id)
                found.append(event)
        for job_id in batch.unknown:
            if job_id in self._open:
                found.append(JobEvent(id="-".join(map(str, self._last[job_id])), type=GONE, job_id=job_id, at=time.time()))
        self._open.difference_update(batch.ended, batch.unknown)
        return found

    def expect(self, job_id: str) -> None:
        """Keep what the shared read brings of a job for after the first read."""
        self._early.setdefault(job_id, [])
        self._last.setdefault(job_id, (0, 0))
        self._open.add(job_id)

    def put(self, job_id: str, batch: Batch) -> None:
        """Hand on what the shared read has brought of a job."""
        if job_id in self._early:
            self._early[job_id].append(batch)
        else:
            self._batches.put_nowait(batch)

    def fail(self, error: LatentlineError) -> None:
        """End with an error."""
        self._batches.put_nowait(error)

    def begin(self, job_ids: Iterable[str], first: Batch) -> None:
        """Hand on what this listener's own first read of these jobs has brought; what came meanwhile follows behind it."""
        told = {event.job_id for event in first.events if event.type != POSITION}
        self._open.difference_update(job_id for job_id in first.ended if job_id not in told)
        if first.events or first.unknown:
            self._batches.put_nowait(first)
        for job_id in job_ids:
            for batch in self._early.pop(job_id, ()):
                self._batches.put_nowait(batch)


def in_order(events: Iterable[JobEvent]) -> list[JobEvent]:
    """Events of several jobs by their time, those of each job in their order; places last."""
    return sorted(events, key=lambda event: (event.type == POSITION, _order(event.id)))


def _order(event_id: str) -> tuple[int, int]:
    """An event's id as numbers: they sort in the order of the stream."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds or 0), int(number or 0)
