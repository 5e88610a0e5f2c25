"""Streams of the jobs that carry a value in their metadata, also of those that are submitted while the stream is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from latentline import records
from latentline.async_client import AsyncClient
from latentline.errors import BrokerUnavailable, LatentlineError
from latentline.jobs import JobEvent
from latentline.listener import Listener
from latentline.records import Created, Look

from .cursors import MAX_JOBS, OVERLAP_MS, GroupCursor

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks for new jobs, of all tenants with open groups in one round trip


@dataclass(eq=False)
class Group:
    """One open stream of jobs with a value."""

    tenant: str
    name: str
    value: str
    cursor: GroupCursor
    listener: Listener
    waiting: list[Created] = field(default_factory=list)  # for a place: a stream follows at most MAX_JOBS at a time
    loaded: bool = False  # the jobs that there were when it was opened are known
    closed: bool = False

    def told(self, event: JobEvent) -> str:
        """Note an event; its id."""
        return self.cursor.told(event)


@dataclass(eq=False)
class _Tenant:
    """The groups of one tenant, and up to where its jobs are known."""

    at_ms: int
    groups: set[Group] = field(default_factory=set)
    known: dict[str, int] = field(default_factory=dict)  # the newest jobs, whose times may still be joined by others

    def learn(self, found: Iterable[Created]) -> None:
        self.known |= {one.job_id: one.at_ms for one in found}
        self.at_ms = max([self.at_ms, *self.known.values()])
        self.known = {job_id: at_ms for job_id, at_ms in self.known.items() if at_ms >= self.at_ms - OVERLAP_MS}


class Groups:
    """All of them in this process. One task looks for new jobs, however many there are."""

    look_s = LOOK_S

    def __init__(self, client: AsyncClient) -> None:
        self._client, self._reader = client, client.event_reader
        self._tenants: dict[str, _Tenant] = {}
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def open(self, tenant: str, name: str, value: str, cursor: GroupCursor) -> AsyncIterator[Group]:
        """Follow a tenant's jobs with a value from where the cursor stands; without a position, those among its newest 2,000 jobs."""
        async with self._reader.listen({}, many=True, stream=True) as listener:
            group = Group(tenant, name, value, cursor, listener)
            place = self._tenants.get(tenant)
            if place is None:
                # First the time, then the jobs: one that is stored between the two is found by both.
                at_ms = await self._client.run(records.newest_at_ms(tenant))
                place = self._tenants.setdefault(tenant, _Tenant(at_ms))
            place.groups.add(group)  # before the read below: a job that is stored meanwhile is not missed
            try:
                found = await self._client.run(records.tagged(tenant, name, value, cursor.since_ms))
                untold = cursor.untold(found)
                group.waiting = untold + [one for one in group.waiting if one not in untold]
                group.loaded = True
                await self._follow(group)
                if self._task is None or self._task.done():
                    self._task = asyncio.create_task(self._look(), name="groups of jobs")
                yield group
            finally:
                group.closed = True
                place.groups.discard(group)
                if not place.groups and self._tenants.get(tenant) is place:
                    del self._tenants[tenant]

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        answered = time.monotonic()
        while self._tenants:
            await asyncio.sleep(self.look_s)
            try:
                await self._look_once()
                answered = time.monotonic()
            except BrokerUnavailable as error:  # the next look finds what this one would have found
                if time.monotonic() - answered > self._reader.outage_s:
                    self._fail(error)
            except Exception as error:
                log.exception("looking for new jobs failed")
                self._fail(LatentlineError(str(error)))

    async def _look_once(self) -> None:
        tenants = dict(self._tenants)
        looks = [Look(tenant, place.at_ms - OVERLAP_MS, place.known) for tenant, place in tenants.items()]
        growing = []
        for place, found in zip(tenants.values(), await self._client.run(records.newest(looks)), strict=True):
            place.learn(found)
            for group in place.groups:
                group.waiting += [one for one in found if one.metadata.get(group.name) == group.value and self._is_new(group, one)]
                if group.waiting:
                    growing.append(group)
        await asyncio.gather(*map(self._grow, growing))

    async def _grow(self, group: Group) -> None:
        try:
            await self._follow(group)
        except LatentlineError as error:  # a stream that is opened again, from its last event, follows these jobs as well
            group.listener.fail(error)

    @staticmethod
    def _is_new(group: Group, one: Created) -> bool:
        return group.cursor.is_new(one) and one not in group.waiting

    async def _follow(self, group: Group) -> None:
        """Follow jobs that wait, as far as there are places."""
        while group.loaded and not group.closed and group.waiting and (free := MAX_JOBS - group.cursor.num_open) > 0:
            begun, group.waiting = group.waiting[:free], group.waiting[free:]
            await self._reader.add(group.listener, {one.job_id: group.cursor.begin(one) for one in begun})
            for one in begun:
                if not group.listener.is_open(one.job_id):  # its last event was told before this stream
                    group.cursor.ended(one.job_id)

    def _fail(self, error: LatentlineError) -> None:
        for place in self._tenants.values():
            for group in place.groups:
                group.listener.fail(error)
