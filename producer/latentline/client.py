"""What applications use: submit jobs, follow them, fetch their pictures' URLs.

:class:`Client` and :class:`AsyncClient` share every operation (generators, see :mod:`latentline.records`); each only
drives them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self

from . import records
from .connection import connect, connect_async
from .errors import InvalidRequest, JobFailed, WaitTimeout
from .images import Images
from .jobs import JobEvent, JobRecord, JobRequest, ModelInfo, Status
from .records import Operation, arun, run
from .settings import Settings

POLL_MS = 1000  # how long one read of an event stream waits; below every socket timeout
SUBMIT_CHUNK = 500  # jobs of one pipeline


class _Operations:
    """What both clients do, without the driving."""

    def __init__(self, settings: Settings | None) -> None:
        self.settings = settings or Settings()
        self.images = Images(self.settings)

    def _submit(self, requests: Sequence[JobRequest]) -> Operation[list[JobRecord]]:
        known = yield from records.models()
        ready = [_fit(request, known) for request in requests]
        made: list[JobRecord] = []
        for start in range(0, len(ready), SUBMIT_CHUNK):
            made += yield from records.submit(
                ready[start : start + SUBMIT_CHUNK],
                self.settings.retention_s,
                tenant_cap=self.settings.tenant_cap,
                durable=self.settings.durable,
            )
        return [self._with_urls(record) for record in made]

    def _get(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.get(job_id)))

    def _cancel(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.cancel(job_id, self.settings.retention_s)))

    def _list(self, status: Status | str | None, cursor: str | None, limit: int) -> Operation[tuple[list[JobRecord], str | None]]:
        try:
            wanted = Status(status) if status else None
        except ValueError:
            raise InvalidRequest("status", status, "one of " + ", ".join(Status)) from None
        page, following = yield from records.list_jobs(wanted, cursor, limit)
        return [self._with_urls(record) for record in page], following

    def _with_urls(self, record: JobRecord) -> JobRecord:
        if not record.images:
            return record
        signed = tuple(image.model_copy(update={"url": self.images.presign(image.key)}) for image in record.images)
        return record.model_copy(update={"images": signed})


def _fit(request: JobRequest, known: dict[str, ModelInfo]) -> JobRequest:
    """The request with its model's own size where it names none; refused where the model cannot do it."""
    info = known.get(request.model)
    if info is None:
        allowed = f"one of: {', '.join(known)}" if known else "a model that a worker serves (none has announced one yet)"
        raise InvalidRequest("model", request.model, allowed)
    width, height = info.size_of(request)
    # The record then says what is made, whatever a later version of the model takes as its default.
    return request.model_copy(update={"width": width, "height": height})


def _finish(record: JobRecord, check: bool) -> JobRecord:
    if check and record.status is not Status.SUCCEEDED:
        reason = f"{record.error.code}: {record.error.message}" if record.error else record.status.value
        raise JobFailed(f"job {record.id} did not succeed ({reason})")
    return record


def _request(request: JobRequest | None, fields: dict[str, Any]) -> JobRequest:
    if request is None:
        return JobRequest.parse(fields)
    if fields:
        raise InvalidRequest("request", ", ".join(fields), "a JobRequest, or its fields by name, but not both")
    return request


class Client(_Operations):
    """Blocking client. Raises :class:`~latentline.errors.LatentlineError` and nothing else on purpose."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._redis = connect(self.settings.redis_url.get_secret_value())

    def submit(self, request: JobRequest | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request or as its fields."""
        return self.submit_many([_request(request, fields)])[0]

    def submit_many(self, requests: Sequence[JobRequest]) -> list[JobRecord]:
        """Enqueue many jobs in few round trips, in order."""
        self.images.check()  # a store that is down fails the submit, not the job after all its work
        return run(self._redis, self._submit(requests))

    def get(self, job_id: str) -> JobRecord:
        return run(self._redis, self._get(job_id))

    def list(self, status: Status | str | None = None, cursor: str | None = None, limit: int = 50) -> tuple[list[JobRecord], str | None]:
        """A page, newest first, and the next page's cursor."""
        return run(self._redis, self._list(status, cursor, limit))

    def cancel(self, job_id: str) -> JobRecord:
        return run(self._redis, self._cancel(job_id))

    def models(self) -> dict[str, ModelInfo]:
        return run(self._redis, records.models())

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
                return _finish(self.get(job_id), check)
            last = found[-1].id if found else last
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; it goes on")

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Operations):
    """The same for asyncio."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._redis = connect_async(self.settings.redis_url.get_secret_value())

    async def submit(self, request: JobRequest | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request or as its fields."""
        return (await self.submit_many([_request(request, fields)]))[0]

    async def submit_many(self, requests: Sequence[JobRequest]) -> list[JobRecord]:
        """Enqueue many jobs in few round trips, in order."""
        await self.check_store()
        return await arun(self._redis, self._submit(requests))

    async def check_store(self) -> None:
        """Raise StoreUnavailable when the object store does not answer (boto3 blocks, hence the thread)."""
        await asyncio.to_thread(self.images.check)

    async def get(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._get(job_id))

    async def list(
        self, status: Status | str | None = None, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[JobRecord], str | None]:
        """A page, newest first, and the next page's cursor."""
        return await arun(self._redis, self._list(status, cursor, limit))

    async def cancel(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._cancel(job_id))

    async def models(self) -> dict[str, ModelInfo]:
        return await arun(self._redis, records.models())

    async def workers(self) -> Sequence[str]:
        """Names of the workers that are alive."""
        return await arun(self._redis, records.workers())

    async def follow(self, job_id: str, last_event_id: str | None = None, block_ms: int = POLL_MS) -> tuple[Sequence[JobEvent], bool]:
        """One read of the events after ``last_event_id``, waiting up to ``block_ms``, and whether nothing more can come."""
        return await arun(self._redis, records.follow(job_id, last_event_id, block_ms))

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Events after ``last_event_id`` as they come, up to the terminal one."""
        ended = False
        while not ended:
            found, ended = await self.follow(job_id, last_event_id)
            for event in found:
                last_event_id = event.id
                yield event

    async def wait(self, job_id: str, timeout_s: float | None = None, *, check: bool = False) -> JobRecord:
        """The record once the job has ended; raises as :meth:`Client.wait`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.events(job_id):
                    pass
        except TimeoutError:
            raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; it goes on") from None
        return _finish(await self.get(job_id), check)

    async def close(self) -> None:
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
