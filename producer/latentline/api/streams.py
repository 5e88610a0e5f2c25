"""The open event streams of this process: how many each API key has, and their end soon after the key is revoked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from latentline.async_client import AsyncClient
from latentline.errors import LatentlineError, NotAuthenticated, TooManyStreams
from latentline.keys import ApiKey
from latentline.listener import Listener

CHECK_S = 2.0  # between two looks at the keys of open streams, all of them in one round trip
MAX_STREAMS = 3000  # of one key on one process; each takes some 50 KB and a connection


@dataclass
class _Open:
    """What is open with one key."""

    digest: str
    streams: set[Listener] = field(default_factory=set)
    waiting: set[Listener] = field(default_factory=set)  # polls that wait


class Streams:
    """One task looks at the keys, however many streams there are."""

    check_s = CHECK_S

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._open: dict[str, _Open] = {}  # by the prefix of the key; "" without keys
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watch(self, key: ApiKey | None, listener: Listener, *, poll: bool = False) -> Iterator[None]:
        """End a listener when its key is gone.

        Args:
            key: None without keys.
            poll: of a request that waits for the end of one job; the number of these has no bound.

        Raises:
            TooManyStreams: as many as are allowed are open.
        """
        prefix = key.prefix if key else ""
        entry = self._open.setdefault(prefix, _Open(key.digest if key else ""))
        if not poll and len(entry.streams) >= MAX_STREAMS:
            raise TooManyStreams(f"{MAX_STREAMS} event streams are open with this API key; follow several jobs on one: /v1/events?jobs=...")
        kind = entry.waiting if poll else entry.streams
        kind.add(listener)
        if key and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(), name="keys of open streams")
        try:
            yield
        finally:
            kind.discard(listener)
            if not entry.streams and not entry.waiting and self._open.get(prefix) is entry:
                del self._open[prefix]

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        answered = time.monotonic()
        while any(self._open):  # "" is no key
            await asyncio.sleep(self.check_s)
            try:
                there = await self._client.keys([prefix for prefix in self._open if prefix])
                answered = time.monotonic()
            except LatentlineError:
                # While the broker is away no key can be revoked, and no stream gets an event.
                if time.monotonic() - answered < self._client.event_reader.outage_s:
                    continue
                there = {}  # what cannot be checked for long is not open
            for prefix, entry in self._open.items():
                now = there.get(prefix)
                if prefix and (now is None or now.digest != entry.digest):
                    for listener in entry.streams | entry.waiting:
                        listener.fail(NotAuthenticated("the API key was revoked"))
