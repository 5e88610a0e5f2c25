"""The jobs that somebody listens to: who does, how far each was read, and what its events have told of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import records
from .errors import JobNotFound, LatentlineError
from .jobs import JobEvent, JobRecord, Status
from .listener import POSITION, Batch, Listener


@dataclass(eq=False)
class _Job:
    """A job that somebody listens to."""

    last: str | None = None  # id of the last event that was read; None until the first listener has read what there was
    record: JobRecord | None = None  # as the last first read had it, without its texts, with what its events have told since
    listeners: set[Listener] = field(default_factory=set)


class Followed:
    """One object for each :class:`latentline.event_reader.EventReader`."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def after(self) -> dict[str, str]:
        """Job by job, the last event that was read, for those whose first listener has read what there was."""
        return {job_id: job.last for job_id, job in self._jobs.items() if job.last is not None}

    def join(self, job_id: str, listener: Listener) -> None:
        """Have a listener follow a job."""
        self._jobs.setdefault(job_id, _Job()).listeners.add(listener)

    def begin(self, record: JobRecord, events: Sequence[JobEvent], after: str | None, listener: Listener) -> None:
        """Note what a listener's own first read has had. Behind that of a job's first listener, the shared read begins.

        Args:
            after: id of the event from which on it was read.
        """
        job = self._jobs.get(record.id)
        if job is None:
            return
        job.record = _without_texts(record)
        if job.last is None:
            job.last = events[-1].id if events else after or records.START
            # The shared read leaves these out, and the first read of another listener may have been made before they came.
            for other in job.listeners - {listener}:
                other.put(record.id, Batch(events))

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
                if listener.stream:
                    listener.put(job_id, Batch([position(job_id, place)]))

    def leave(self, listener: Listener) -> None:
        """End all that a listener follows."""
        for job_id in listener.jobs:
            self.leave_job(listener, job_id)

    def leave_job(self, listener: Listener, job_id: str) -> None:
        """The same for one job."""
        if job := self._jobs.get(job_id):
            job.listeners.discard(listener)
            if not job.listeners:
                del self._jobs[job_id]

    def hand_on(self, job_id: str, events: Sequence[JobEvent]) -> None:
        """Give what the shared read has brought to all listeners of a job."""
        if events and (job := self._jobs.get(job_id)):
            job.last = events[-1].id
            if job.record:
                job.record = job.record.model_copy(update=_told(events))
            ended = [job_id] if any(event.terminal for event in events) else []
            if ended:
                del self._jobs[job_id]  # nothing more comes
            for listener in job.listeners:
                listener.put(job_id, Batch(events, ended))

    def fail(self, job_id: str, error: LatentlineError) -> None:
        """Tell the listeners of a job that no more comes. Those that come later begin anew."""
        if job := self._jobs.pop(job_id, None):
            for listener in job.listeners:
                if isinstance(error, JobNotFound) and listener.many:
                    listener.put(job_id, Batch((), unknown=[job_id]))
                else:
                    listener.fail(error)

    def fail_impatient(self, error: LatentlineError) -> None:
        """End the listeners that wait for no outage."""
        for listener in {one for job in self._jobs.values() for one in job.listeners if not one.stream}:
            listener.fail(error)
            self.leave(listener)

    def fail_all(self, error: LatentlineError) -> None:
        """End everybody."""
        for job_id in list(self._jobs):
            self.fail(job_id, error)


def position(job_id: str, place: int) -> JobEvent:
    """The event that tells of a place in the queue."""
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
