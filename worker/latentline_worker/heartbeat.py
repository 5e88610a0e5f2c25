"""Tells Redis how the jobs in flight stand, renews their leases, and hears what became of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from latentline.errors import LatentlineError
from latentline.jobs import Claim, Phase
from latentline.records import Beat, Records, Verdict

from .engine.request import Request
from .metadata import encode_preview

log = logging.getLogger(__name__)

INTERVAL_S = 0.1  # also the longest that a cancel waits before the engine hears of it
ALIVE_EVERY_S = 2.0


@dataclass(eq=False)
class Tracked:
    """One claimed job as the heartbeat sees it. ``stop_reason`` is set once and never taken back."""

    claim: Claim
    request: Request | None = None
    uploading: bool = False
    shown: int = 0  # the step of the newest preview that was sent
    stop_reason: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, request: Request) -> None:
        """From now on the engine's request is watched, and stopped when the job is."""
        with self._lock:
            self.request = request
            if self.stop_reason:
                request.cancel(self.stop_reason)

    def stop(self, reason: str) -> None:
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            if self.request:
                self.request.cancel(reason)


class Heartbeat:
    """One thread, one pipelined round trip per beat for all jobs of the process."""

    def __init__(self, records: Records, worker: str, lease_s: float, alive: Callable[[], None]) -> None:
        self._records, self._worker, self._lease_s, self._alive = records, worker, lease_s, alive
        self._tracked: set[Tracked] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def track(self, claim: Claim) -> Tracked:
        tracked = Tracked(claim)
        with self._lock:
            self._tracked.add(tracked)
        return tracked

    def forget(self, tracked: Tracked) -> None:
        with self._lock:
            self._tracked.discard(tracked)

    def _loop(self) -> None:
        elapsed = ALIVE_EVERY_S
        while not self._stopped.wait(INTERVAL_S):
            elapsed += INTERVAL_S
            try:
                self._beat()
                if elapsed >= ALIVE_EVERY_S:
                    elapsed = 0.0
                    self._alive()
            except LatentlineError as error:  # the broker is away: the jobs go on, the leases tell
                log.warning("heartbeat: %s", error)
            except Exception:
                log.exception("heartbeat failed")

    def _beat(self) -> None:
        with self._lock:
            tracked = list(self._tracked)
        if not tracked:
            return
        verdicts = self._records.beat([self._describe(one) for one in tracked])
        for one, verdict in zip(tracked, verdicts, strict=True):
            if verdict is not Verdict.GO:
                one.stop(verdict.value)

    def _describe(self, one: Tracked) -> Beat:
        request = one.request
        beat = Beat(job_id=one.claim.record.id, token=one.claim.token, phase=Phase.ENCODING, step=0, lease_s=self._lease_s)
        if request is None:
            return beat
        # In the job's own steps: some samplers call the network more than once for each.
        step = request.step * one.claim.record.num_steps // request.num_steps
        preview = request.preview
        if preview and preview.step > one.shown:
            one.shown = preview.step
            beat = replace(beat, previews=tuple(encode_preview(image) for image in preview.pixels.cpu().numpy()))
        return replace(beat, phase=Phase.UPLOADING if one.uploading else request.phase, step=step, batch_jobs=request.batch_jobs)
