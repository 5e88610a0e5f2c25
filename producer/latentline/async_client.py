"""The client for asyncio: for applications, and under the HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

import redis.asyncio

from . import records
from .connection import connect_async
from .errors import JobNotFound, WaitTimeout
from .event_reader import EventReader
from .jobs import JobEvent, JobRecord, Sending, Status
from .keys import ApiKey, Limits
from .listener import Listener
from .models import ServedModel
from .operations import Operations, Outcome, Request, accepted_record, finished, one_request
from .records import AnswerOutcome, JobFilter, Operation, Overview, arun
from .settings import Settings
from .timeline import Timeline

T = TypeVar("T")

LOOK_S = 1.0  # after which a wait for events looks up


class AsyncClient(Operations):
    """:class:`latentline.Client` for asyncio, with what the HTTP API needs besides."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._redis = connect_async(self.settings.redis_url.get_secret_value())
        self._events = EventReader(self._redis, self._with_urls)

    async def submit(self, request: Request | None = None, **fields: Any) -> JobRecord:
        """Enqueue one job, given as a request, as its fields, or as the request of a record (without its idempotency key)."""
        return accepted_record((await self.submit_many([one_request(request, fields)]))[0])

    async def submit_many(
        self, requests: Sequence[Request], limits: Limits | None = None, sending: Sending | None = None
    ) -> Sequence[Outcome]:
        """Enqueue many jobs in few round trips, in order; returns and raises as :meth:`Client.submit_many`.

        Args:
            limits: of the API key with which the jobs came: its bounds on what their tenant has queued and running.
            sending: of the request that asks for the jobs, where it may be sent again for the same ones.
        """
        await self.check_store()
        return await arun(self._redis, self._submit(requests, limits or Limits(), sending))

    async def take_unanswered(self, sending: Sending) -> JobRecord | None:
        """The job that an earlier sending of this request has made; None when there is none."""
        found = await arun(self._redis, records.take_unanswered(sending))
        return self._with_urls(found) if found else None

    async def note_answer(self, job_id: str, sending: Sending, outcome: AnswerOutcome) -> bool:
        """Note what became of a request's answer; see :func:`latentline.records.note_answer`."""
        return await arun(self._redis, records.note_answer(job_id, sending, outcome))

    async def check_store(self) -> None:
        """Raise StoreUnavailable when the object store does not answer (boto3 blocks, hence the thread)."""
        await asyncio.to_thread(self.images.check)

    async def get(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._get(job_id))

    async def list(
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
        return await arun(self._redis, self._list(status, cursor, limit, tenant, where))

    async def get_with_key(self, job_id: str, prefix: str) -> tuple[JobRecord | JobNotFound, ApiKey | None]:
        """A job, and the API key with this prefix, in one round trip."""
        found, key = await arun(self._redis, records.get_with_key(job_id, prefix))
        return found if isinstance(found, JobNotFound) else self._with_urls(found), key

    async def timeline(self, job_id: str, tenant: str | None = None) -> Timeline:
        """What happened to a job: waiting, attempts with their steps, callbacks. With ``tenant``, only of a job of its own."""
        return await arun(self._redis, records.timeline(job_id, tenant))

    async def keys(self, prefixes: Collection[str]) -> dict[str, ApiKey]:
        """The API keys with these prefixes, those that are there."""
        return await arun(self._redis, records.find_keys(prefixes))

    async def overview(self) -> Overview:
        """The fleet at a glance: workers, queues, the newest dead letters."""
        return await arun(self._redis, records.overview())

    async def replay(self, dead_id: str) -> JobRecord:
        """Submit the request of a dead letter again, as a new job, and drop the letter.

        Raises:
            JobNotFound: there is no such letter, or this version cannot read its request.
            InvalidRequest: it is of an unreadable message.
        """
        letter = await arun(self._redis, records.dead_letter(dead_id))
        record = await self.submit(records.request_of_letter(letter))
        await arun(self._redis, records.drop_dead_letter(dead_id))
        return record

    async def drop_dead_letter(self, dead_id: str) -> None:
        """Forget a dead letter; raises JobNotFound."""
        await arun(self._redis, records.drop_dead_letter(dead_id))

    @property
    def connection_pool(self) -> redis.asyncio.ConnectionPool:
        """To the broker, for libraries that keep something of their own there."""
        return self._redis.connection_pool

    async def cancel(self, job_id: str) -> JobRecord:
        return await arun(self._redis, self._cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Forget an ended job: its record at once, its pictures within seconds, by any worker."""
        await arun(self._redis, self._delete(job_id))

    async def picture(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """A picture's bytes, or those from ``start`` to ``end``, both included."""
        return await asyncio.to_thread(self.images.download, key, start, end)

    async def run(self, operation: Operation[T]) -> T:
        """Drive an operation of :mod:`latentline.records`."""
        return await arun(self._redis, operation)

    async def models(self) -> dict[str, ServedModel]:
        """The models that are served now, and how many workers serve each and have it in memory."""
        return await arun(self._redis, records.served())

    async def workers(self) -> Sequence[str]:
        """Names of the workers that are alive."""
        return await arun(self._redis, records.workers())

    def listen(self, job_id: str, last_event_id: str | None = None) -> AbstractAsyncContextManager[Listener]:
        """Follow a job from after ``last_event_id``. All listeners of this client share one connection to the broker."""
        return self._events.listen({job_id: last_event_id})

    @property
    def event_reader(self) -> EventReader:
        """For listeners to many jobs."""
        return self._events

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[JobEvent]:
        """Events after ``last_event_id`` as they come, up to the terminal one."""
        async with self.listen(job_id, last_event_id) as listener:
            while not listener.ended:
                for event in await listener.next(LOOK_S):
                    yield event

    async def wait(self, job_id: str, timeout_s: float | None = None, *, check: bool = False) -> JobRecord:
        """The record once the job has ended; raises as :meth:`Client.wait`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.events(job_id):
                    pass
        except TimeoutError:
            raise WaitTimeout(f"job {job_id} has not ended within {timeout_s:g} s; the job goes on") from None
        return finished(await self.get(job_id), check)

    async def close(self) -> None:
        await self._events.close()
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
