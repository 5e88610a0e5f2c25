"""Clients that went away before their answer: their jobs run on for a while, since they may come back, and are cancelled then."""

from __future__ import annotations

import asyncio
import contextlib

from latentline.async_client import AsyncClient
from latentline.errors import LatentlineError
from latentline.jobs import Sending

GRACE_S = 60.0  # from the closed connection to the cancel; clients that send again do so within seconds


class Leavers:
    """Jobs whose client has closed its connection. When this process ends meanwhile, they run to their end."""

    grace_s = GRACE_S

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()

    def expect(self, job_id: str, sending: Sending) -> None:
        """Cancel a job after the grace, unless a request that was sent again has taken it by then."""
        task = asyncio.create_task(self._expect(job_id, sending), name=f"client of {job_id} gone")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _expect(self, job_id: str, sending: Sending) -> None:
        with contextlib.suppress(LatentlineError):  # a job that could not be cancelled runs to its end
            await self._client.note_answer(job_id, sending, "dropped")
            await asyncio.sleep(self.grace_s)
            if await self._client.note_answer(job_id, sending, "given up"):
                await self._client.cancel(job_id)
