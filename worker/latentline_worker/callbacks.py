"""Status callbacks: a signed POST to an address that was checked, from a thread that no job waits for."""

from __future__ import annotations

import ipaddress
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx

from latentline.errors import ConfigurationError
from latentline.jobs import JobRecord
from latentline.webhooks import sign

log = logging.getLogger(__name__)

TRIES_AFTER_S = (0.0, 1.0, 5.0)  # waits before each try; the outbox of a later version keeps trying for days
TIMEOUT_S = 15.0
MAX_WAITING = 1000  # callbacks in memory; beyond that new ones are dropped and logged
NUM_THREADS = 4

Resolve = Callable[[str, int], Sequence[str]]


class Refused(Exception):
    """The receiver's address may not be called."""


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, without repeats."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked_address(host: str, port: int, allow_private: bool, resolver: Resolve = resolve) -> str:
    """One address of the host, resolved once; the caller connects to that very address.

    Raises:
        Refused: any of its addresses is not global (a name that resolves to both is an attack, not a mistake).
    """
    addresses = resolver(host, port)
    if not addresses:
        raise Refused(f"{host} has no address")
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
        embedded_private = mapped is not None and not mapped.is_global
        if not allow_private and (not ip.is_global or ip.is_multicast or embedded_private):
            raise Refused(f"{host} resolves to {address}, which is not a global address")
    return addresses[0]


class CallbackSender:
    """Delivers callbacks of one worker.

    Args:
        secret: ``whsec_...``; without one no callback is sent.
        allow_private: also call addresses that are not global.
    """

    def __init__(self, secret: str | None, allow_private: bool, resolver: Resolve = resolve) -> None:
        if secret is not None:
            sign(secret, "check", 0, b"")  # a malformed secret is found at start, not at the first callback
        self._secret, self._allow_private, self._resolver = secret, allow_private, resolver
        # trust_env: a proxy from the environment would connect for us, to an address nobody checked.
        self._http = httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._queue: queue.Queue[tuple[str, str, bytes] | None] = queue.Queue(MAX_WAITING)
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._loop, name=f"callbacks-{i}", daemon=True) for i in range(NUM_THREADS)]
        for thread in self._threads:
            thread.start()

    def notify(self, record: JobRecord, event_type: str) -> None:
        """Hand over one status change; returns at once, whatever the receiver does."""
        callback = record.request.callback
        if callback is None or event_type not in callback.events:
            return
        message_id = f"msg_{record.id}_{record.attempt}_{event_type.removeprefix('job.')}"
        if self._secret is None:
            log.warning("callback %s: not_configured: set LATENTLINE_CALLBACK_SECRET to send callbacks", message_id)
            return
        try:
            self._queue.put_nowait((callback.url, message_id, _body(record, event_type)))
        except queue.Full:
            log.error("callback %s: dropped: %d callbacks are waiting already", message_id, MAX_WAITING)

    def close(self, timeout_s: float) -> None:
        """Deliver what is waiting, but not for longer than ``timeout_s``."""
        self._closing.set()
        for _ in self._threads:
            try:
                self._queue.put(None, timeout=timeout_s)
            except queue.Full:
                break
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._http.close()

    def send(self, url: str, message_id: str, body: bytes) -> str:
        """One try; the outcome is ``delivered``, ``refused``, ``disabled`` (410) or ``failed: why``."""
        if self._secret is None:
            raise ConfigurationError("callbacks need LATENTLINE_CALLBACK_SECRET")
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            address = checked_address(host, port, self._allow_private, self._resolver)
        except Refused as error:
            log.warning("callback %s: refused: %s", message_id, error)
            return "refused"
        except (OSError, UnicodeError) as error:
            return f"failed: {host} cannot be resolved ({type(error).__name__})"
        # The checked address stands in the URL, so nothing resolves the name again; Host and SNI keep the name.
        target = httpx.URL(url).copy_with(host=address, fragment=None)
        headers = {
            "host": parts.netloc,
            "content-type": "application/json",
            "user-agent": "latentline",
            **sign(self._secret, message_id, int(time.time()), body),
        }
        try:
            with self._http.stream("POST", target, content=body, headers=headers, extensions={"sni_hostname": host}) as response:
                status = response.status_code  # the answer's body is never read
        except (httpx.HTTPError, OSError) as error:
            return f"failed: {type(error).__name__}"
        if 200 <= status < 300:
            return "delivered"
        return "disabled" if status == 410 else f"failed: status {status}"

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            url, message_id, body = item
            outcome = ""
            for wait_s in TRIES_AFTER_S:
                if wait_s and self._closing.wait(wait_s):
                    break
                try:
                    outcome = self.send(url, message_id, body)
                except Exception:  # a thread of this pool must outlive every receiver
                    log.exception("callback %s", message_id)
                    outcome = "failed: internal error"
                if not outcome.startswith("failed"):
                    break
            log.info("callback %s: %s", message_id, outcome)


def _body(record: JobRecord, event_type: str) -> bytes:
    data = {
        "id": record.id,
        "status": record.status.value,
        "attempt": record.attempt,
        "model": record.request.model,
        "metadata": record.request.metadata,
        "images": [image.model_dump(mode="json", exclude={"url"}) for image in record.images],
        "error": record.error.model_dump() if record.error else None,
    }
    return json.dumps({"type": event_type, "timestamp": record.finished_at or record.started_at, "data": data}).encode()
