"""Open event streams end soon after their API key is revoked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from latentline.client import AsyncClient
from latentline.errors import LatentlineError, NotAuthenticated
from latentline.event_reader import Listener
from latentline.keys import ApiKey

CHECK_S = 2.0  # between two looks at the keys of open streams, all of them in one round trip


class Streams:
    """The open streams of this process by their keys. One task looks at the keys, however many streams there are."""

    check_s = CHECK_S

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._open: dict[ApiKey, set[Listener]] = {}
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watch(self, key: ApiKey, listener: Listener) -> Iterator[None]:
        """End a listener when its key is gone."""
        self._open.setdefault(key, set()).add(listener)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look(), name="keys of open streams")
        try:
            yield
        finally:
            self._open[key].discard(listener)
            if not self._open[key]:
                del self._open[key]

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        while self._open:
            await asyncio.sleep(self.check_s)
            try:
                there = await self._client.keys([key.prefix for key in self._open])
            except LatentlineError:
                there = {}  # what cannot be checked is not open
            for key, listeners in self._open.items():
                now = there.get(key.prefix)
                if now is None or now.digest != key.digest:
                    for listener in listeners:
                        listener.put(NotAuthenticated("the API key was revoked"))
