"""The one job service that every dialect calls: jobs, as far as whoever makes the request may see and change them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.datastructures import State

from latentline import tracing
from latentline.async_client import AsyncClient
from latentline.errors import InvalidRequest, LatentlineError
from latentline.jobs import ImageRef, JobEvent, JobRecord, JobRequest, Sending
from latentline.listener import Listener
from latentline.models import ServedModel
from latentline.operations import Outcome
from latentline.records import JobFilter, Overview, not_found
from latentline.timeline import Timeline

from .auth import Access, Principal
from .cursors import GroupCursor
from .estimates import Estimates
from .groups import Group, Groups
from .leavers import Leavers
from .places import Places
from .streams import Streams


class JobService:
    """Jobs as one principal may see and change them: those of other tenants are as if they did not exist."""

    def __init__(self, state: State, principal: Principal) -> None:
        self._client: AsyncClient = state.client
        self._access: Access = state.access
        self._streams: Streams = state.streams
        self._leavers: Leavers = state.leavers
        self._groups: Groups = state.groups
        self._places: Places = state.places
        self._estimates: Estimates = state.estimates
        self.principal = principal

    async def submit(self, data: dict[str, Any], sending: Sending | None = None) -> JobRecord:
        """Enqueue one job, or get the one that an earlier sending of the same request has made.

        Args:
            sending: where the client may send the request again, in this or another process of the API.

        Raises:
            InvalidRequest: also for another tenant than the key's, and for a priority above the key's ceiling.
            RateExceeded: too many submissions.
            TenantQuotaExceeded: too much of the tenant's is queued and running.
        """
        if sending and sending.count and (found := await self._client.take_unanswered(sending)):
            return found
        await self._access.count(self.principal)
        (outcome,) = await self._client.submit_many([JobRequest.parse(self._own(data))], self.principal.limits, sending)
        if isinstance(outcome, LatentlineError):
            raise outcome
        tracing.note_job(outcome)
        return outcome

    async def get(self, job_id: str) -> JobRecord:
        """One job; raises JobNotFound, also for a job of another tenant."""
        return self._seen(await self._client.get(job_id))

    async def timeline(self, job_id: str) -> Timeline:
        """What happened to a job; raises JobNotFound."""
        sees = self.principal.sees
        found = await self._client.timeline(job_id, sees)
        return found if sees is None else found.for_owner()

    def eta_of_event(self, event: JobEvent) -> float | None:
        """The same as of an event of a job that is listened to."""
        record = self._client.event_reader.jobs.record(event.job_id)
        return self._estimates.eta_s(record) if record else None

    def eta_s(self, record: JobRecord) -> float | None:
        """Seconds until the job's last step, estimated; None where that is not known."""
        return self._estimates.eta_s(record)

    async def submit_batch(self, items: Sequence[Any]) -> Sequence[Outcome]:
        """Enqueue many jobs: for each, in order, the record or the error with which it was refused.

        Raises:
            RateExceeded: they are more than the key's rate allows now; none was submitted.
        """
        tracing.note_batch(len(items))
        await self._access.count(self.principal, len(items))
        parsed = [self._parsed(item) for item in items]
        accepted = await self._client.submit_many([one for one in parsed if isinstance(one, JobRequest)], self.principal.limits)
        following = iter(accepted)
        return [next(following) if isinstance(one, JobRequest) else one for one in parsed]

    def _parsed(self, item: Any) -> JobRequest | InvalidRequest:
        try:
            return JobRequest.parse(self._own(item) if isinstance(item, dict) else item)
        except InvalidRequest as error:
            return error

    async def list(
        self, status: str | None, cursor: str | None, limit: int, tenant: str | None = None, where: JobFilter | None = None
    ) -> tuple[list[JobRecord], str | None]:
        """A page of jobs, newest first, and the cursor of the next page.

        Raises:
            InvalidRequest: another tenant than the key's, unless it is an admin's.
        """
        sees = self.principal.sees
        if sees is not None and tenant not in (None, sees):
            raise InvalidRequest("tenant", tenant, f"{sees!r}, which is the API key's, or left out")
        return await self._client.list(status, cursor, limit, sees or tenant, where)

    async def ended(self, job_id: str, wait_s: float) -> JobRecord:
        """The record when the job has ended, or after so many seconds; raises JobNotFound."""
        await self.wait(job_id, wait_s)
        return await self.get(job_id)

    async def wait(self, job_id: str, wait_s: float) -> None:
        """Return when the job has ended, or after so many seconds; raises NotAuthenticated within seconds after the key was revoked."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._client.event_reader.listen({job_id: None}, self._sees) as listener:
                with self._streams.watch(self.principal.key, listener, poll=True):
                    while not listener.ended:
                        await listener.next(wait_s)

    def client_gone(self, job_id: str, sending: Sending) -> None:
        """Whoever asked for this job has closed the connection: it is cancelled after a grace unless they come back for it."""
        self._leavers.expect(job_id, sending)

    async def answer_written(self, job_id: str, sending: Sending) -> None:
        """The answer with this job went out."""
        with contextlib.suppress(LatentlineError):  # the answer is out; at worst the same request gets this job again
            await self._client.note_answer(job_id, sending, "written")

    async def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job; raises JobNotFound."""
        tracing.note_job(await self.get(job_id))  # a job never changes its tenant
        return await self._client.cancel(job_id)

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended; raises JobNotFound and JobNotEnded."""
        await self.get(job_id)
        await self._client.delete(job_id)

    async def picture(self, image: ImageRef, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a picture of a job that :meth:`get` gave, or those from ``start`` to ``end``, both included."""
        return await self._client.picture(image.key, start, end)

    @contextlib.asynccontextmanager
    async def listen(self, job_id: str, last_event_id: str | None) -> AsyncIterator[Listener]:
        """Follow a job; raises JobNotFound and TooManyStreams. It ends within seconds after the key was revoked."""
        async with self._client.event_reader.listen({job_id: last_event_id}, self._sees, stream=True) as listener:
            with self._streams.watch(self.principal.key, listener):
                self._places.begin()
                yield listener

    @contextlib.asynccontextmanager
    async def listen_to(self, after: Mapping[str, str | None]) -> AsyncIterator[Listener]:
        """Follow many jobs, each from after an event; raises as :meth:`listen`, JobNotFound where none of them is there."""
        async with self._client.event_reader.listen(after, self._sees, many=True, stream=True) as listener:
            with self._streams.watch(self.principal.key, listener):
                self._places.begin()
                yield listener

    async def overview(self) -> Overview:
        """The fleet at a glance, all tenants: for administrators."""
        return await self._client.overview()

    async def replay(self, dead_id: str) -> JobRecord:
        """Submit a dead letter's request again; raises JobNotFound and InvalidRequest. For administrators."""
        return await self._client.replay(dead_id)

    async def drop_dead_letter(self, dead_id: str) -> None:
        """Forget a dead letter; raises JobNotFound. For administrators."""
        await self._client.drop_dead_letter(dead_id)

    @contextlib.asynccontextmanager
    async def listen_to_group(self, name: str, value: str, cursor: GroupCursor, tenant: str | None) -> AsyncIterator[Group]:
        """Follow the jobs of a tenant whose metadata has a value, also those that are submitted later; raises TooManyStreams.

        Args:
            tenant: another than the key's, for those who may see it.
        """
        own = self.principal.key.tenant if self.principal.key else "default"
        if self.principal.sees is not None and tenant not in (None, own):
            raise InvalidRequest("tenant", tenant, f"{own!r}, which is the API key's, or left out")
        async with self._groups.open(tenant or own, name, value, cursor) as group:
            with self._streams.watch(self.principal.key, group.listener):
                self._places.begin()
                yield group

    async def models(self) -> dict[str, ServedModel]:
        return await self._client.models()

    def _seen(self, record: JobRecord) -> JobRecord:
        return seen(record, self.principal)

    def _sees(self, record: JobRecord) -> bool:
        return self.principal.sees in (None, record.request.tenant)

    def _own(self, data: dict[str, Any]) -> dict[str, Any]:
        """A submission with the tenant of its key."""
        key = self.principal.key
        if key is None:
            return data
        if data.get("tenant", key.tenant) != key.tenant:
            raise InvalidRequest("tenant", data["tenant"], f"{key.tenant!r}, which is the API key's, or left out")
        top, priority = key.limits.top_priority, data.get("priority")
        if priority is None and "priority" not in data and top > JobRequest.model_fields["priority"].default:
            data = {**data, "priority": top}
        elif isinstance(priority, int | float) and priority < top:
            raise InvalidRequest("priority", priority, f"{top} to 9 with this API key (0 is served first)")
        return {**data, "tenant": key.tenant}


def seen(record: JobRecord, principal: Principal) -> JobRecord:
    """A record that this principal may see; raises JobNotFound as for one that does not exist."""
    if principal.sees not in (None, record.request.tenant):
        raise not_found(record.id)
    return record
