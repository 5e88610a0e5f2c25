"""The guard on where callbacks connect: users name the addresses, so none is trusted.

Each connection resolves its host once, is refused if :mod:`latentline.addresses` does not allow each of the addresses, and goes
to one of those that were checked. A second look-up between the check and the connection could give another answer (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterable
from typing import Any

import httpcore

from latentline.addresses import CallbackRule
from latentline.errors import LatentlineError


class AddressRefused(LatentlineError):
    """The host has an address, or the URL a port, to which callbacks must not connect."""

    code = "callback_refused"


async def _resolve(host: str, port: int) -> list[Any]:
    """``socket.getaddrinfo`` on a daemon thread, so that the try's time limit also holds when the name server does not answer."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Any]] = loop.create_future()

    def tell(outcome: list[Any] | Exception) -> None:
        if found.done():  # the try was cancelled meanwhile
            return
        if isinstance(outcome, Exception):
            found.set_exception(outcome)
        else:
            found.set_result(outcome)

    def look_up() -> None:
        outcome: list[Any] | Exception
        try:
            outcome = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the try has ended
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    return await found


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that it has checked. TLS still verifies the host's name: httpcore passes that on separately."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend, rule: CallbackRule) -> None:
        self._inner, self._rule = inner, rule

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        if not self._rule.allows_port(port):
            raise AddressRefused(f"callbacks do not go to port {port}")
        try:
            found = await _resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the host cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # One bad address refuses the host: which of them a client picks must not matter.
        if not all(self._rule.allows_address(address) for address in addresses):
            raise AddressRefused("the host has an address that is not global")
        failure: Exception = httpcore.ConnectError("the host has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure
