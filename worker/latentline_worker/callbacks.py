"""Status callbacks: signed POSTs to addresses that users name, so every address is suspect.

One daemon thread runs an event loop for all of them: a slow receiver costs a task, never a task thread of the worker. Each
connection resolves its host once, refuses it when any of its addresses is not global, and goes to an address that
was checked; redirects are not followed, proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import httpcore
import httpx

from latentline.errors import LatentlineError
from latentline.jobs import Callback, JobRecord
from latentline.webhooks import sign

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0  # of one try, from the name look-up to the status line; the specification asks for 15 to 30
PAUSES_S = (0.0, 1.0, 5.0)  # before each try
MAX_PENDING = 1000  # callbacks waiting or under way; more are dropped, the record stays the truth
MAX_CONNECTIONS = 32
CONNECT_TIMEOUT_S = 5.0  # to one address, so that a dead one leaves time for the next
# Ranges that Python's own tables call global, or came to know only in later patch releases.
_NOT_GLOBAL = [ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "fec0::/10", "5f00::/16")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Outcome(StrEnum):
    DELIVERED = "delivered"
    FAILED = "failed"  # no try was answered with 2xx
    GONE = "gone"  # 410: the receiver wants no more of them
    REFUSED = "refused"  # an address that is not global
    NOT_CONFIGURED = "not_configured"  # no secret; nothing is ever sent unsigned
    DROPPED = "dropped"  # too many are pending, or the sender is closed


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


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that it has looked at. TLS keeps the host's name, which httpcore passes on later."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend, allow_private: bool) -> None:
        self._inner, self._allow_private = inner, allow_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the host cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # Any bad one spoils them all: which one a client takes must not matter.
        if not self._allow_private and not all(is_global(address) for address in addresses):
            raise AddressRefused("the host has an address that is not global")
        failure: Exception = httpcore.ConnectError("the host has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class CallbackSender:
    """Sends a worker's callbacks.

    Args:
        secret: ``whsec_...``; None sends nothing.
        allow_private: also to addresses that are not global, for receivers in one's own network.
        backend: how connections are made; for tests.

    Raises:
        ConfigurationError: the secret is malformed.
    """

    def __init__(
        self,
        secret: str | None,
        allow_private: bool,
        *,
        pauses_s: tuple[float, ...] = PAUSES_S,
        timeout_s: float = TIMEOUT_S,
        max_pending: int = MAX_PENDING,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        if secret is not None:
            sign(secret, "check", 0, b"")  # a malformed secret stops the worker at its start
        self._secret, self._pauses_s, self._timeout_s, self._max_pending = secret, pauses_s, timeout_s, max_pending
        self._backend = GuardedBackend(backend or httpcore.AnyIOBackend(), allow_private)
        self._pending: set[Future[Outcome]] = set()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)  # waiting for one is not the receiver's time
        self._closed = False

    def notify(self, record: JobRecord, event_type: str) -> None:
        """Tell the job's receiver if it asked for this event; returns at once, the outcome goes to the log."""
        callback = record.request.callback
        if callback is not None and event_type in callback.events:
            self._enqueue(callback, event_type, record)

    def send(self, callback: Callback, event: str, record: JobRecord) -> Outcome:
        """The same, and wait for the outcome."""
        return self._enqueue(callback, event, record).result()

    def close(self, timeout_s: float) -> None:
        """Take no more, wait for those under way, give up the rest."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread, pending = self._loop, self._thread, list(self._pending)
        if loop is None or thread is None:
            return
        deadline = time.monotonic() + timeout_s
        for future in pending:
            with contextlib.suppress(Exception):
                future.result(max(0.0, deadline - time.monotonic()))
        left = sum(not future.done() for future in pending)
        if left:
            log.warning("%d callbacks were given up at shutdown", left)
        for future in pending:
            future.cancel()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)

    def _enqueue(self, callback: Callback, event: str, record: JobRecord) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if self._secret is None:
            log.warning("callback %s of job %s is not sent: LATENTLINE_CALLBACK_SECRET is not set", event, record.id)
            future.set_result(Outcome.NOT_CONFIGURED)
            return future
        # Built here: what is told is the record as it is now.
        message_id, body = _message(event, record)
        with self._lock:
            if self._closed or len(self._pending) >= self._max_pending:
                log.warning("callback %s of job %s is dropped: %s", event, record.id, "shutting down" if self._closed else "too many wait")
                future.set_result(Outcome.DROPPED)
                return future
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name="callbacks", daemon=True)
                self._thread.start()
            work = self._deliver(self._secret, callback.url, event, record.id, message_id, body)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._pending.add(future)
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Outcome]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            # Not the executor: a name look-up that hangs in it cannot be cancelled, and its threads must not hold us.
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            if self._pool is not None:
                loop.run_until_complete(self._pool.aclose())
            loop.close()

    async def _deliver(self, secret: str, url: str, event: str, job_id: str, message_id: str, body: bytes) -> Outcome:
        outcome, reason = Outcome.FAILED, ""
        for pause_s in self._pauses_s:
            await asyncio.sleep(pause_s)
            try:
                async with self._slots, asyncio.timeout(self._timeout_s):
                    status = await self._post(secret, url, message_id, body)
            except AddressRefused as error:
                outcome, reason = Outcome.REFUSED, error.message
                break
            except TimeoutError:
                reason = f"no answer within {self._timeout_s:g} s"
                continue
            except Exception as error:  # whatever a stranger's server or URL brings about fails this callback alone
                reason = f"{type(error).__name__}: {error}"
                continue
            reason = f"status {status}"
            if 200 <= status < 300:
                outcome = Outcome.DELIVERED
                break
            if status == 410:
                outcome = Outcome.GONE
                break
        # Without the path and the query: they may carry the receiver's own secrets.
        log.info("callback %s of job %s: %s (%s)", event, job_id, outcome.value, reason)
        return outcome

    async def _post(self, secret: str, url: str, message_id: str, body: bytes) -> int:
        if self._pool is None:
            # No connection is kept: each one is made to an address that was just checked.
            self._pool = httpcore.AsyncConnectionPool(max_keepalive_connections=0, max_connections=None, network_backend=self._backend)
        target = httpx.URL(url)  # also turns international names into what DNS and TLS know
        headers: dict[bytes | str, bytes | str] = {
            "host": target.netloc.decode(),
            "user-agent": "latentline",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        for name, value in sign(secret, message_id, int(time.time()), body).items():
            headers[name] = value
        request = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        limits = {"connect": min(CONNECT_TIMEOUT_S, self._timeout_s), "read": self._timeout_s, "write": self._timeout_s}
        # Only the status counts; nothing of the answer's body is read.
        async with self._pool.stream("POST", request, headers=headers, content=body, extensions={"timeout": limits}) as answer:
            return int(answer.status)


def _message(event: str, record: JobRecord) -> tuple[str, bytes]:
    """Id and body. The id is the same whenever this event of this job is told: receivers drop duplicates by it."""
    name = event.removeprefix("job.")
    # A job may start more than once, and ends once.
    message_id = f"msg_{record.id}_{name}" + ("" if record.status.terminal else f"_{record.attempt}")
    told_at = record.finished_at or record.started_at or record.created_at
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
    timestamp = datetime.fromtimestamp(told_at, UTC).isoformat().replace("+00:00", "Z")
    return message_id, json.dumps({"id": message_id, "type": event, "timestamp": timestamp, "data": data}).encode()
