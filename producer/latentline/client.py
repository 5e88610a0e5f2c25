"""What applications use: submit jobs, follow them, get the URLs of their images.

:class:`Client` and :class:`latentline.AsyncClient` share every operation (generators, see :mod:`latentline.records`) and differ in
how they run them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from . import records
from .connection import connect
from .errors import WaitTimeout
from .jobs import JobEvent, JobRecord, Status
from .keys import Limits
from .models import ServedModel
from .operations import Operations, Outcome, Request, accepted_record, finished, one_request
from .records import JobFilter, run
from .settings import Settings
from .timeline import Timeline

POLL_MS = 1000  # how long one read of an event stream waits; below every socket timeout


class Client(Operations):
    """Blocking client. Every error that it raises on purpose is a :class:`~latentline.errors.LatentlineError`."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._redis = connect(self.settings.redis_url.get_secret_value())

    def submit(self, request: Request | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request, as its fields, or as the request of a record (without its idempotency key)."""
        return accepted_record(self.submit_many([one_request(request, fields)])[0])

    def submit_many(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Enqueue many jobs in few round trips, in order.

        Returns:
            for each request, in order, the accepted record or the error with which it was refused. Jobs whose outcome is
            BrokerUnavailable may have been accepted: the answer was lost.

        Raises:
            ServiceUnavailable: the object store or the broker does not answer, and nothing was submitted.
        """
        self.images.check()  # fails before anything is queued if the images could not be stored
        return run(self._redis, self._submit(requests, Limits()))

    def get(self, job_id: str) -> JobRecord:
        return run(self._redis, self._get(job_id))

    def list(
        self,
        status: Status | str | None = None,
        cursor: str | None = None,
        limit: int = 50,
        tenant: str | None = None,
        where: JobFilter | None = None,
    ) -> tuple[list[JobRecord], str | None]:
        """A page of records, newest first, and the cursor of the next page.

        Args:
            tenant: of its jobs alone.
            where: further conditions: model, time of creation, metadata.
        """
        return run(self._redis, self._list(status, cursor, limit, tenant, where))

    def timeline(self, job_id: str) -> Timeline:
        """What happened to a job: waiting, attempts with their steps, callbacks."""
        return run(self._redis, records.timeline(job_id))

    def cancel(self, job_id: str) -> JobRecord:
        return run(self._redis, self._cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Forget an ended job: its record at once, its pictures within seconds, by any worker."""
        run(self._redis, self._delete(job_id))

    def models(self) -> dict[str, ServedModel]:
        """The models that are served now, and how many workers serve each and have it in memory."""
        return run(self._redis, records.served())

    def workers(self) -> Sequence[str]:
        """Names of the workers that are alive."""
        return run(self._redis, records.workers())

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[JobEvent]:
        """Events after ``last_event_id`` as they come, up to the terminal one."""
        ended = False
        while not ended:
            found, ended = run(self._redis, records.follow(job_id, last_event_id, POLL_MS))
            for event in found:
                last_event_id = event.id
                yield event

    def wait(self, job_id: str, timeout_s: float | None = None, *, check: bool = False) -> JobRecord:
        """The record once the job has ended.

        Raises:
            WaitTimeout: it has not within ``timeout_s``; the job goes on.
            JobFailed: with ``check``, when it has not succeeded.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        last: str | None = None
        while True:
            left_ms = POLL_MS if deadline is None else int(min(POLL_MS, max(1.0, (deadline - time.monotonic()) * 1000)))
            found, ended = run(self._redis, records.follow(job_id, last, left_ms))
            if ended:
                return finished(self.get(job_id), check)
            last = found[-1].id if found else last
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; the job goes on")

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
