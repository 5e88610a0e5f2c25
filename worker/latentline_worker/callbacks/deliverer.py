"""Delivers status callbacks: signed POSTs to URLs that users name.

Callbacks form an outbox: a record's transition and the callback that tells of it are written in one atomic script
(:mod:`latentline.scripts`). A process of its own delivers them, never a GPU worker. Connections pass the address guard
(:mod:`.address`); redirects are not followed, and proxies from the environment are not used.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from latentline.addresses import CallbackRule
from latentline.errors import ConfigurationError
from latentline.logs import about_job
from latentline.records import Records
from latentline.tracing import current_traceparent
from latentline.webhooks import sign

from .address import AddressRefused, GuardedBackend
from .message import Links, message_body
from .metrics import CallbackMetrics
from .spans import note_outcome, try_span

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0  # of one try, from the name look-up to the status line; the Standard Webhooks specification asks for 15 to 30
# Seconds before each try, from the Standard Webhooks specification; each is varied by up to a fifth.
SCHEDULE_S = (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
# A callback is locked for the time limit of a try and this much more: a lock that ran out during a try would let a second
# deliverer send the same callback. When a deliverer is lost, another takes its callback once the lock has run out.
LOCK_MARGIN_S = 45.0
MAX_PER_HOST = 4  # concurrent tries per receiver host, so that a slow host does not occupy all threads
MAX_BODY_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 5.0  # per address, so that a dead address leaves time for the next one


class Deliverer:
    """Takes callbacks from the outbox and sends them: one try per call; further tries follow the specification's schedule.

    Args:
        records: the outbox.
        secrets: ``whsec_...`` for tenants without a secret of their own; each callback is signed with all of them. Without a
            secret nothing is sent.
        rule: the addresses and ports that callbacks may reach.
        links: signs the URLs of pictures; None leaves them out.
        schedule_s: seconds before each try.
        timeout_s: limit of one try.
        backend: makes the connections; tests replace it.
        metrics: told of each try.
        tracer: makes a span of each try; None makes none.

    Raises:
        ConfigurationError: a secret is malformed.
    """

    def __init__(
        self,
        records: Records,
        secrets: Sequence[str],
        rule: CallbackRule,
        *,
        links: Links | None = None,
        timeout_s: float = TIMEOUT_S,
        schedule_s: Sequence[float] = SCHEDULE_S,
        backend: httpcore.AsyncNetworkBackend | None = None,
        metrics: CallbackMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._metrics = metrics or CallbackMetrics()
        for secret in secrets:
            sign(secret, "check", 0, b"")  # a malformed secret must stop the process at its start
        self._links = links
        self._records, self._secrets, self._timeout_s, self._schedule_s = records, list(secrets), timeout_s, schedule_s
        self._backend = GuardedBackend(backend or httpcore.AnyIOBackend(), rule)
        self._busy: Counter[str] = Counter()  # host -> tries in progress; hosts without any have no entry
        self._lock = threading.Lock()

    def deliver(self, callback_id: str) -> None:
        """Try a callback once if it is due, and write the outcome to the outbox."""
        taken = self._records.take_callback(callback_id, self._timeout_s + LOCK_MARGIN_S)
        if taken is None:
            return
        with about_job(taken["job_id"], taken["record"].traceparent if taken["record"] else ""):
            self._deliver(taken)

    def _deliver(self, taken: dict[str, Any]) -> None:
        if taken["record"] is None:
            self._settle(taken, "failed", "the record is of a version that this deliverer cannot read")
            return
        try:
            receiver = self._records.receiver(taken["url"], taken["record"].request.tenant)
        except ConfigurationError as error:
            self._later(taken, error.message)
            return
        secrets = receiver.secrets or self._secrets
        if receiver.disabled:
            self._settle(taken, "gone", "the receiver has answered 410 before")
            return
        if not secrets:
            self._settle(taken, "failed", "LATENTLINE_CALLBACK_SECRET is not set, and the tenant has no secret of its own")
            return
        try:
            host = httpx.URL(taken["url"]).host
        except httpx.InvalidURL as error:
            self._settle(taken, "failed", f"{type(error).__name__}: {error}")
            return
        if not self._enter(host):
            self._records.put_back_callback(taken["id"], taken["tries"], random.uniform(0.5, 1.5))
            return
        try:
            with self._metrics.seconds.time(), try_span(self._tracer, taken):
                self._try(taken, secrets)
        finally:
            self._leave(host)

    def _try(self, taken: dict[str, Any], secrets: Sequence[str]) -> None:
        retry_after_s = 0.0
        try:
            body = message_body(taken, self._links)
            if len(body) > MAX_BODY_BYTES:
                self._settle(taken, "failed", f"the body would have {len(body)} bytes; allowed: {MAX_BODY_BYTES}")
                return
            status, retry_after_s = asyncio.run(self._post(taken["url"], taken["id"], body, secrets))
        except AddressRefused as error:
            self._settle(taken, "refused", error.message)
            return
        except TimeoutError:
            reason = f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # whatever a receiver's server or URL causes fails this callback alone
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = f"status {status}"
            if 200 <= status < 300 or status == 410:
                self._settle(taken, "gone" if status == 410 else "delivered", reason)
                return
        self._later(taken, reason, retry_after_s)

    def _later(self, taken: dict[str, Any], reason: str, retry_after_s: float = 0.0) -> None:
        """This try has failed: the next one comes by the schedule, if there is one."""
        tries = taken["tries"]
        if tries >= len(self._schedule_s):
            self._settle(taken, "failed", reason)
        else:
            pause_s = max(self._schedule_s[tries] * random.uniform(0.8, 1.2), retry_after_s)
            self._settle(taken, "pending", reason, pause_s)

    def _settle(self, taken: dict[str, Any], status: str, reason: str, delay_s: float = 0.0) -> None:
        # The URL is not logged: its path and query may hold the receiver's own secrets.
        self._metrics.outcomes.labels(status).inc()
        note_outcome(self._tracer, status, reason)
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

    async def _post(self, url: str, message_id: str, body: bytes, secrets: Sequence[str]) -> tuple[int, float]:
        """The answer's status, and its Retry-After in seconds (0 without one)."""
        target = httpx.URL(url)  # also encodes international names as DNS and TLS expect them
        headers: dict[bytes | str, bytes | str] = {
            "host": target.netloc.decode(),
            "user-agent": "latentline",
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        timestamp = int(time.time())
        signed = [sign(secret, message_id, timestamp, body) for secret in secrets]
        for name, value in signed[0].items():
            headers[name] = value
        if traceparent := current_traceparent():
            headers["traceparent"] = traceparent
        headers["webhook-signature"] = " ".join(one["webhook-signature"] for one in signed)
        request = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        limits = {"connect": min(CONNECT_TIMEOUT_S, self._timeout_s), "read": self._timeout_s, "write": self._timeout_s}
        # A new pool without keep-alive: each connection goes to an address that was just checked.
        pool = httpcore.AsyncConnectionPool(max_keepalive_connections=0, network_backend=self._backend)
        async with (
            asyncio.timeout(self._timeout_s),
            pool,
            # Only the status is used; the answer's body is not read.
            pool.stream("POST", request, headers=headers, content=body, extensions={"timeout": limits}) as answer,
        ):
            return int(answer.status), _retry_after({name.lower(): value for name, value in answer.headers}.get(b"retry-after"))


def _retry_after(value: bytes | None) -> float:
    """Seconds from a Retry-After header, which holds a number or a date; at most one day, 0 if it cannot be read."""
    if value is None:
        return 0.0
    text = value.decode("ascii", "replace").strip()
    try:
        seconds = float(text) if text.isdigit() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), 86400.0)
