"""Tells open streams when the places of their jobs in the queue have changed."""

from __future__ import annotations

import asyncio
import logging

from latentline import records
from latentline.async_client import AsyncClient
from latentline.errors import LatentlineError

log = logging.getLogger(__name__)

LOOK_S = 3.0  # between two looks at the places of jobs that wait and are listened to, in one call of a script
MOST = 1000  # jobs in one look, each of which costs the broker one ZRANK; where more are listened to, they take turns


class Places:
    """One task for all streams of this process. It looks while there are any."""

    look_s, most = LOOK_S, MOST

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._next = 0  # where the next turn begins in the list of those that wait
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """See that the places are looked at, from when a stream was opened."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look(), name="places in the queue")

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        while self._client.event_reader.jobs:
            await asyncio.sleep(self.look_s)
            try:
                await self.look_once()
            except LatentlineError as error:
                log.debug("the places of jobs are not known: %s", error.message)

    async def look_once(self) -> None:
        """Look at the places of the jobs whose turn it is, and tell those that have changed."""
        jobs = self._client.event_reader.jobs
        waiting = jobs.waiting()
        turn = waiting[self._next : self._next + self.most]
        self._next = self._next + self.most if self._next + self.most < len(waiting) else 0
        if not turn:
            return
        places = await self._client.run(records.positions({one.id: one.request.model for one in turn}))
        for one in turn:
            place = places[one.id]
            if place is not None and place != one.queue_position:
                jobs.moved(one.id, place)
