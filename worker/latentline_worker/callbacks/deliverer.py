"""Status callbacks: signed POSTs to addresses that users name, so every address is suspect.

They are an outbox: the record's transition and the callback that tells of it are written in one step
(:mod:`latentline.scripts`), and a process of its own delivers them, never a GPU worker. Each connection resolves its host
once, refuses it when any of its addresses is not global, and goes to an address that was checked; redirects are not
followed, proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import httpx

from latentline.errors import LatentlineError
from latentline.jobs import JobRecord
from latentline.records import Records
from latentline.settings import Network
from latentline.webhooks import sign

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0  # of one try, from the name look-up to the status line; the specification asks for 15 to 30
# Seconds before each try, as the Standard Webhooks specification has them; each is varied by a fifth.
SCHEDULE_S = (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
LOCK_S = 60  # a deliverer that says nothing for this long is lost, and another takes its callback
MAX_PER_HOST = 4  # tries at a time to one receiver's host: a slow one leaves the others their threads
MAX_BODY_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 5.0  # to one address, so that a dead one leaves time for the next
# Ranges that Python's own tables call global, or came to know only in later patch releases.
_NOT_GLOBAL = [ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "fec0::/10", "5f00::/16")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(LatentlineError):
    """The host has an address to which callbacks must not go."""

    code = "callback_refused"


def is_global(address: str) -> bool:
    """Whether packets for this address leave for the public internet, also when it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_global(str(embedded))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in network for network in _NOT_GLOBAL)


async def _resolve(host: str, port: int) -> list[Any]:
    """``socket.getaddrinfo`` on a thread that nobody waits for: a dead name server must not hold a try beyond its time."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Any]] = loop.create_future()

    def tell(outcome: list[Any] | Exception) -> None:
        if found.done():  # given up meanwhile
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
        with contextlib.suppress(RuntimeError):  # the loop is gone, and the try with it
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    return await found


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that it has looked at. TLS keeps the host's name, which httpcore passes on later."""

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
        # Any bad one spoils them all: which one a client takes must not matter.
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


class Deliverer:
    """Takes callbacks from the outbox and sends them: one try a call, the next one by the specification's schedule.

    Args:
        records: the outbox.
        secrets: ``whsec_...``; each callback is signed with all of them. None given: nothing is ever sent unsigned.
        allow: networks that callbacks may go to although their addresses are not global: receivers of one's own.
        backend: how connections are made; for tests.

    Raises:
        ConfigurationError: a secret is malformed.
    """

    def __init__(
        self,
        records: Records,
        secrets: Sequence[str],
        allow: Sequence[Network],
        *,
        timeout_s: float = TIMEOUT_S,
        schedule_s: Sequence[float] = SCHEDULE_S,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        for secret in secrets:
            sign(secret, "check", 0, b"")  # a malformed secret stops the process at its start
        self._records, self._secrets, self._timeout_s, self._schedule_s = records, list(secrets), timeout_s, schedule_s
        self._backend = GuardedBackend(backend or httpcore.AnyIOBackend(), allow)
        self._busy: Counter[str] = Counter()  # host -> tries under way; no entry where there is none
        self._lock = threading.Lock()

    def deliver(self, callback_id: str) -> None:
        """One try, if it is due; what comes of it is written to the outbox."""
        taken = self._records.take_callback(callback_id, LOCK_S)
        if taken is None:
            return
        if taken["record"] is None:
            self._settle(taken, "failed", "the record is of a version that this deliverer cannot read")
            return
        if self._records.receiver_disabled(taken["url"]):
            self._settle(taken, "gone", "the receiver has answered 410 before")
            return
        if not self._secrets:
            self._settle(taken, "failed", "LATENTLINE_CALLBACK_SECRET is not set")
            return
        try:
            host = httpx.URL(taken["url"]).host
        except httpx.InvalidURL as error:
            self._settle(taken, "failed", f"{type(error).__name__}: {error}")
            return
        if not self._enter(host):
            self._records.put_back_callback(callback_id, taken["tries"], random.uniform(0.5, 1.5))
            return
        try:
            self._try(taken)
        finally:
            self._leave(host)

    def _try(self, taken: dict[str, Any]) -> None:
        body = message_body(taken)
        retry_after_s = 0.0
        try:
            if len(body) > MAX_BODY_BYTES:
                self._settle(taken, "failed", f"the body would have {len(body)} bytes; allowed: {MAX_BODY_BYTES}")
                return
            status, retry_after_s = asyncio.run(self._post(taken["url"], taken["id"], body))
        except AddressRefused as error:
            self._settle(taken, "refused", error.message)
            return
        except TimeoutError:
            reason = f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # whatever a stranger's server or URL brings about fails this callback alone
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = f"status {status}"
            if 200 <= status < 300 or status == 410:
                self._settle(taken, "gone" if status == 410 else "delivered", reason)
                return
        tries = taken["tries"]
        if tries >= len(self._schedule_s):
            self._settle(taken, "failed", reason)
        else:
            pause_s = max(self._schedule_s[tries] * random.uniform(0.8, 1.2), retry_after_s)
            self._settle(taken, "pending", reason, pause_s)

    def _settle(self, taken: dict[str, Any], status: str, reason: str, delay_s: float = 0.0) -> None:
        # Without the URL's path and query in the log: they may carry the receiver's own secrets.
        log.info("callback %s, try %d: %s (%s)", taken["id"], taken["tries"], status, reason)
        entry = {"at": round(time.time(), 3), "try": taken["tries"], "result": reason[:300].encode(errors="replace").decode()}
        self._records.settle_callback(taken["id"], taken["tries"], entry, status, delay_s)

    def _enter(self, host: str) -> bool:
        with self._lock:
            if self._busy[host] >= MAX_PER_HOST:
                return False
            self._busy[host] += 1
            return True

    def _leave(self, host: str) -> None:
        with self._lock:
            self._busy[host] -= 1
            if not self._busy[host]:
                del self._busy[host]

    async def _post(self, url: str, message_id: str, body: bytes) -> tuple[int, float]:
        """Status and Retry-After in seconds."""
        target = httpx.URL(url)  # also turns international names into what DNS and TLS know
        headers: dict[bytes | str, bytes | str] = {
            "host": target.netloc.decode(),
            "user-agent": "latentline",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        timestamp = int(time.time())
        signed = [sign(secret, message_id, timestamp, body) for secret in self._secrets]
        for name, value in signed[0].items():
            headers[name] = value
        headers["webhook-signature"] = " ".join(one["webhook-signature"] for one in signed)
        request = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        limits = {"connect": min(CONNECT_TIMEOUT_S, self._timeout_s), "read": self._timeout_s, "write": self._timeout_s}
        # A pool of its own, and no connection is kept: each is made to an address that was just checked.
        pool = httpcore.AsyncConnectionPool(max_keepalive_connections=0, network_backend=self._backend)
        async with (
            asyncio.timeout(self._timeout_s),
            pool,
            # Only the status counts; nothing of the answer's body is read.
            pool.stream("POST", request, headers=headers, content=body, extensions={"timeout": limits}) as answer,
        ):
            return int(answer.status), _retry_after({name.lower(): value for name, value in answer.headers}.get(b"retry-after"))


def _retry_after(value: bytes | None) -> float:
    """Seconds, from a number or a date; a day at most."""
    if value is None:
        return 0.0
    text = value.decode("ascii", "replace").strip()
    try:
        seconds = float(text) if text.isdigit() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), 86400.0)


def message_body(taken: dict[str, Any]) -> bytes:
    """The JSON of a callback: the record as it was at the event. ``seq`` orders the events of one job."""
    record: JobRecord = taken["record"]
    data = {
        "id": record.id,
        "status": record.status.value,
        "model": record.request.model,
        "attempt": record.attempt,
        "step": record.step,
        "num_steps": record.num_steps,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "images": [image.model_dump(mode="json") for image in record.images],
        "error": record.error.model_dump(mode="json") if record.error else None,
        "tenant": record.request.tenant,
        "metadata": record.request.metadata,
    }
    timestamp = datetime.fromtimestamp(taken["at"], UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"id": taken["id"], "type": taken["type"], "timestamp": timestamp, "seq": taken["seq"], "data": data}).encode()
