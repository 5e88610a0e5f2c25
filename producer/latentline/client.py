"""What applications use: submit jobs, follow them, get the URLs of their images.

:class:`Client` and :class:`AsyncClient` share every operation (generators, see :mod:`latentline.records`) and differ in how
they run them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

import redis.asyncio

from . import records
from .addresses import CallbackRule
from .connection import connect, connect_async
from .errors import InvalidRequest, JobFailed, JobNotFound, LatentlineError, WaitTimeout
from .event_reader import EventReader, Listener
from .images import Images
from .jobs import JobEvent, JobRecord, JobRequest, ModelInfo, ResolvedRequest, Status, Submission
from .keys import ApiKey, Limits
from .records import CachedFleet, Fleet, Operation, arun, run
from .settings import Settings

POLL_MS = 1000  # how long one read of an event stream waits; below every socket timeout
SUBMIT_CHUNK = 500  # jobs of one pipeline

Request = JobRequest | ResolvedRequest

Outcome = JobRecord | LatentlineError
"""What became of one of many submissions: the accepted record, or why there is none."""


class _Operations:
    """The operations of both clients."""

    def __init__(self, settings: Settings | None) -> None:
        self.settings = settings or Settings()
        self.images = Images(self.settings)
        self._fleet = CachedFleet()

    def _write(self, chunk: Sequence[Submission], limits: Limits) -> Operation[list[Outcome]]:
        outcomes = yield from records.submit(
            chunk,
            self.settings.retention_s,
            tenant_cap=limits.max_cost or self.settings.tenant_cap,
            max_jobs=limits.max_jobs,
            durable=self.settings.durable,
        )
        return [one if isinstance(one, LatentlineError) else self._with_urls(one) for one in outcomes]

    def _submit(self, requests: Sequence[Request], limits: Limits) -> Operation[list[Outcome]]:
        accepted = yield from self._fleet.accept_many(lambda fleet: _accept(requests, fleet, self.settings.callback_rule))
        written: list[Outcome] = []
        failure: LatentlineError | None = None
        for chunk in _chunks(accepted):
            try:
                with records.domain_errors():
                    written += yield from self._write(chunk, limits)
            except LatentlineError as error:
                failure = error
                break  # a broker that fails would take seconds to fail again for each chunk
        return _outcomes(accepted, written, failure)

    def _get(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.get(job_id)))

    def _cancel(self, job_id: str) -> Operation[JobRecord]:
        return self._with_urls((yield from records.cancel(job_id, self.settings.retention_s)))

    def _delete(self, job_id: str) -> Operation[None]:
        return records.delete(job_id)

    def _list(
        self, status: Status | str | None, cursor: str | None, limit: int, tenant: str | None
    ) -> Operation[tuple[list[JobRecord], str | None]]:
        if status and status not in list(Status):
            raise InvalidRequest("status", status, "one of " + ", ".join(Status))
        page, following = yield from records.list_jobs(Status(status) if status else None, cursor, limit, tenant=tenant)
        return [self._with_urls(record) for record in page], following

    def _with_urls(self, record: JobRecord) -> JobRecord:
        if not record.images:
            return record
        signed = tuple(image.model_copy(update={"url": self.images.presign(image.key)}) for image in record.images)
        return record.model_copy(update={"images": signed})


def _accept(requests: Sequence[Request], fleet: Fleet, rule: CallbackRule) -> list[Submission | LatentlineError]:
    accepted: list[Submission | LatentlineError] = []
    for request in requests:
        try:
            if isinstance(request, ResolvedRequest):  # of a record: checked as what any client sends
                # Without its idempotency key, which stands for what was sent before the defaults were filled in.
                fields = request.model_dump(mode="json", exclude={"idempotency_key"}, exclude_defaults=True)
                request = JobRequest.parse(fields)
            if request.callback is not None:
                rule.check(request.callback.url)
            accepted.append(fleet.accept(request))
        except LatentlineError as error:
            accepted.append(error)
    return accepted


def _chunks(accepted: Sequence[Submission | LatentlineError]) -> Iterator[list[Submission]]:
    ready = [one for one in accepted if isinstance(one, Submission)]
    for start in range(0, len(ready), SUBMIT_CHUNK):
        yield ready[start : start + SUBMIT_CHUNK]


def _outcomes(
    accepted: Sequence[Submission | LatentlineError], written: Sequence[Outcome], failure: LatentlineError | None
) -> list[Outcome]:
    """What was refused and what was written, in the order of the requests; ``failure`` for those without an answer."""
    rest = itertools.chain(written, itertools.repeat(failure) if failure else ())
    return [next(rest) if isinstance(one, Submission) else one for one in accepted]


def _record(outcome: Outcome) -> JobRecord:
    if isinstance(outcome, LatentlineError):
        raise outcome
    return outcome


def _finish(record: JobRecord, check: bool) -> JobRecord:
    if check and record.status is not Status.SUCCEEDED:
        reason = f"{record.error.code}: {record.error.message}" if record.error else record.status.value
        raise JobFailed(f"job {record.id} did not succeed ({reason})")
    return record


def _request(request: Request | None, fields: dict[str, Any]) -> Request:
    if request is None:
        return JobRequest.parse(fields)
    if fields:
        raise InvalidRequest("request", ", ".join(fields), "a JobRequest, or its fields by name, but not both")
    return request


class Client(_Operations):
    """Blocking client. Every error that it raises on purpose is a :class:`~latentline.errors.LatentlineError`."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._redis = connect(self.settings.redis_url.get_secret_value())

    def submit(self, request: Request | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request, as its fields, or as the request of a record (without its idempotency key)."""
        return _record(self.submit_many([_request(request, fields)])[0])

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
        self, status: Status | str | None = None, cursor: str | None = None, limit: int = 50, tenant: str | None = None
    ) -> tuple[list[JobRecord], str | None]:
        """A page of records, newest first, and the cursor of the next page; with ``tenant``, of its jobs alone."""
        return run(self._redis, self._list(status, cursor, limit, tenant))

    def cancel(self, job_id: str) -> JobRecord:
        return run(self._redis, self._cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Forget an ended job: its record at once, its pictures within seconds, by any worker."""
        run(self._redis, self._delete(job_id))

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
                raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; the job goes on")

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
        self._events = EventReader(self._redis)

    async def submit(self, request: Request | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request, as its fields, or as the request of a record (without its idempotency key)."""
        return _record((await self.submit_many([_request(request, fields)]))[0])

    async def submit_many(self, requests: Sequence[Request], limits: Limits | None = None) -> Sequence[Outcome]:
        """Enqueue many jobs in few round trips, in order; returns and raises as :meth:`Client.submit_many`.

        Args:
            limits: of the API key with which the jobs came: its bounds on what their tenant has queued and running.
        """
        await self.check_store()
        return await arun(self._redis, self._submit(requests, limits or Limits()))

    async def check_store(self) -> None:
        """Raise StoreUnavailable when the object store does not answer (boto3 blocks, hence the thread)."""
        await asyncio.to_thread(self.images.check)

    async def get(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._get(job_id))

    async def list(
        self, status: Status | str | None = None, cursor: str | None = None, limit: int = 50, tenant: str | None = None
    ) -> tuple[list[JobRecord], str | None]:
        """A page of records, newest first, and the cursor of the next page; with ``tenant``, of its jobs alone."""
        return await arun(self._redis, self._list(status, cursor, limit, tenant))

    async def get_with_key(self, job_id: str, prefix: str) -> tuple[JobRecord | JobNotFound, ApiKey | None]:
        """A job, and the API key with this prefix, in one round trip."""
        found, key = await arun(self._redis, records.get_with_key(job_id, prefix))
        return found if isinstance(found, JobNotFound) else self._with_urls(found), key

    async def keys(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        """The API keys with these prefixes, those that are there."""
        return await arun(self._redis, records.find_keys(prefixes))

    @property
    def connection_pool(self) -> redis.asyncio.ConnectionPool:
        """To the broker, for libraries that keep something of their own there."""
        return self._redis.connection_pool

    async def cancel(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Forget an ended job: its record at once, its pictures within seconds, by any worker."""
        await arun(self._redis, self._delete(job_id))

    async def ended(self, job_id: str, wait_s: float) -> JobRecord:
        """The record when the job has ended, or after ``wait_s`` seconds as it is then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self.listen(job_id) as listener:
                while not listener.ended:
                    await listener.next(wait_s)
        return await self.get(job_id)

    async def picture(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """A picture's bytes, or those from ``start`` to ``end``, both included."""
        return await asyncio.to_thread(self.images.download, key, start, end)

    async def models(self) -> dict[str, ModelInfo]:
        return await arun(self._redis, records.models())

    async def workers(self) -> Sequence[str]:
        """Names of the workers that are alive."""
        return await arun(self._redis, records.workers())

    def listen(self, job_id: str, last_event_id: str | None = None) -> AbstractAsyncContextManager[Listener]:
        """Follow a job from after ``last_event_id``. All listeners of this client share one connection to the broker."""
        return self._events.listen(job_id, last_event_id)

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Events after ``last_event_id`` as they come, up to the terminal one."""
        async with self.listen(job_id, last_event_id) as listener:
            while not listener.ended:
                for event in await listener.next(POLL_MS / 1000):
                    yield event

    async def wait(self, job_id: str, timeout_s: float | None = None, *, check: bool = False) -> JobRecord:
        """The record once the job has ended; raises as :meth:`Client.wait`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.events(job_id):
                    pass
        except TimeoutError:
            raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; the job goes on") from None
        return _finish(await self.get(job_id), check)

    async def close(self) -> None:
        await self._events.close()
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
