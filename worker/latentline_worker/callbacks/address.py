"""The guard on where callbacks connect: users name the addresses, so none is trusted.

Each connection resolves its host once, is refused if any of the addresses is not global, and goes to one of the addresses
that were checked. A second look-up between the check and the connection could give another answer (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import httpcore

from latentline.errors import LatentlineError
from latentline.settings import Network

# Ranges that are not global although Python's own tables call them so, always or before some patch release.
_NOT_GLOBAL = [ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "fec0::/10", "5f00::/16")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(LatentlineError):
    """The host has an address to which callbacks must not connect."""

    code = "callback_refused"


def is_global(address: str) -> bool:
    """Whether an address is on the public internet. An IPv6 address that embeds an IPv4 address is judged by that one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_global(str(embedded))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in network for network in _NOT_GLOBAL)


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

    def __init__(self, inner: httpcore.AsyncNetworkBackend, allow: Sequence[Network]) -> None:
        self._inner, self._allow = inner, allow

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await _resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the host cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # One bad address refuses the host: which of them a client picks must not matter.
        if not all(is_global(address) or self._allowed(address) for address in addresses):
            raise AddressRefused("the host has an address that is not global")
        failure: Exception = httpcore.ConnectError("the host has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _allowed(self, address: str) -> bool:
        ip = ipaddress.ip_address(address)
        return any(ip in network for network in self._allow)
