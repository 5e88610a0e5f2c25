"""Where callbacks may go. Users name the URLs, so none is trusted.

One rule for both sides: the API and the clients judge what a URL shows at submission, and the process that delivers judges the
addresses that the host has at that moment, since a name may change its meaning in between.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .errors import InvalidRequest

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS = "80,443,8080,8443"

# Ranges that are not global although Python's own tables call them so, always or before some patch release. 168.63.129.16 is
# Azure's host service: it answers inside of every virtual machine there, like the link-local addresses of other clouds.
_NOT_GLOBAL = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "3fff::/20", "fec0::/10", "5f00::/16",
    )
]  # fmt: skip
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


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


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks and single addresses, separated by commas.

    Raises:
        ValueError: one of them is neither a network nor an address.
    """
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"networks or addresses separated by commas, such as 10.1.0.0/16: {error}") from None


def parse_ports(text: str) -> tuple[range, ...]:
    """Ports and ranges of ports, separated by commas: ``80,443,8000-8999``.

    Raises:
        ValueError: one of them is no port from 1 to 65535 and no range of them, or there is none.
    """
    found = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        ends = [end.strip() for end in (first, last or first)]
        numbers = [int(end) for end in ends if end.isascii() and end.isdigit() and len(end) <= 5]
        if len(numbers) < 2 or not 1 <= numbers[0] <= numbers[1] <= 65535:
            raise ValueError(f"ports from 1 to 65535 separated by commas, such as 443,8000-8999; not {part.strip()[:40]!r}")
        found.append(range(numbers[0], numbers[1] + 1))
    return tuple(found)


@dataclass(frozen=True)
class CallbackRule:
    """Which addresses and ports callbacks may reach.

    Args:
        networks: networks that may be reached although their addresses are not global: the operator's own receivers.
        ports: the ports that may be reached, of any host.
    """

    networks: tuple[Network, ...] = ()
    ports: tuple[range, ...] = field(default_factory=lambda: parse_ports(DEFAULT_PORTS))

    def allows_address(self, address: str) -> bool:
        if is_global(address):
            return True
        ip = ipaddress.ip_address(address)
        return any(ip in network for network in self.networks)

    def allows_port(self, port: int) -> bool:
        return any(port in ports for ports in self.ports)

    def check(self, url: str) -> None:
        """Raise InvalidRequest for a URL that can never be delivered: its port or the address that stands in it is refused.

        A host's name is not resolved here: what it means is judged at each delivery.
        """
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if not self.allows_port(port):
            raise InvalidRequest("callback.url", url, f"one of the ports {self._shown_ports()} (LATENTLINE_CALLBACK_PORTS)")
        address = _literal(parts.hostname or "")
        if address is not None and not self.allows_address(address):
            raise InvalidRequest("callback.url", url, "a global address, or one of LATENTLINE_CALLBACK_ALLOW")

    def _shown_ports(self) -> str:
        return ", ".join(str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}" for ports in self.ports)


def _literal(host: str) -> str | None:
    """The address that a host is without a look-up: written out, in the short forms of ``inet_aton``, or ``localhost``."""
    host = host.removesuffix(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f000001: resolvers take them for addresses
    except (OSError, UnicodeError):
        return None
