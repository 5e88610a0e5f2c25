"""Tells Redis how the jobs in flight stand, renews their leases, and hears what became of them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from latentline.errors import LatentlineError
from latentline.jobs import Claim, Phase
from latentline.records import Beat, Records, Verdict
from latentline_worker.engine.checkpoint import CheckpointSchedule
from latentline_worker.engine.request import Request
from latentline_worker.images.encode import encode_preview

log = logging.getLogger(__name__)

INTERVAL_S = 0.1  # also the longest that a cancel waits before the engine hears of it
TEND_EVERY_S = 1.0


@dataclass(eq=False)
class Tracked:
    """One claimed job as the heartbeat sees it. ``stop_reason`` is set once and never taken back."""

    claim: Claim
    request: Request | None = None
    uploading: bool = False
    shown: int = 0  # the step of the newest preview that was sent
    saved: int = 0  # network calls in the newest checkpoint that was looked at
    saved_step: int = 0  # the job's own steps in the newest that was written
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
    """One thread, one pipelined round trip per beat for all jobs of the process; checkpoints go the same way.

    Args:
        records: where the jobs stand.
        lease_s: for how long each beat renews a lease.
        announce: called every ``TEND_EVERY_S``; says that this worker is there.
        tend: called as often; looks after what belongs to no worker. Not for one lease after the broker was away: the
            leases of all workers ran out meanwhile, and each has to have the chance to renew its own.
        stalled_for: seconds for which the engine has finished nothing while it has work.
        stall_s: a stall after which the engine counts as wedged: its jobs' leases are no longer renewed.
        give_up: called when the engine is wedged and no job is left that needs only uploading; ends the process.
        pulse: called at every beat, whether the broker answers or not: the process is alive.
        pace: told what checkpoints cost.
    """

    def __init__(
        self,
        records: Records,
        lease_s: float,
        tend: Callable[[], None],
        announce: Callable[[], None] = lambda: None,
        stalled_for: Callable[[], float] = lambda: 0.0,
        stall_s: float = float("inf"),
        give_up: Callable[[], None] = lambda: None,
        pulse: Callable[[], None] = lambda: None,
        pace: CheckpointSchedule | None = None,
    ) -> None:
        self._records, self._lease_s, self._tend, self._announce = records, lease_s, tend, announce
        self._stalled_for, self._stall_s, self._pace = stalled_for, stall_s, pace
        self._give_up, self._pulse = give_up, pulse
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

    def release_all(self) -> None:
        """Give back every job that is still here: the process ends, and that is no crash of theirs."""
        with self._lock:
            tracked = list(self._tracked)
        for one in tracked:
            self._records.release(one.claim.record.id, one.claim.token)

    def save(self, tracked: Tracked) -> None:
        """Write the job's newest checkpoint unless it is written already."""
        request = tracked.request
        checkpoint = request.checkpoint if request else None
        if request is None or checkpoint is None or checkpoint.step <= tracked.saved:
            return
        started = time.thread_time()  # what it takes of a core: the device does not wait for the broker's answer
        data = checkpoint.to_bytes(request.work)
        step = _own_steps(tracked, checkpoint.step)
        if data is not None and self._records.checkpoint(tracked.claim.record.id, tracked.claim.token, step, data):
            tracked.saved_step = step
        tracked.saved = checkpoint.step  # also one that is too large or was refused: it would be so at every beat
        if self._pace:
            self._pace.record_written(time.thread_time() - started)

    def _loop(self) -> None:
        next_tend = next_announce = time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            with contextlib.suppress(OSError):  # a readiness file that cannot be written must not cost the leases
                self._pulse()
            try:
                self._beat()
                if time.monotonic() >= next_announce:
                    next_announce = time.monotonic() + TEND_EVERY_S
                    self._announce()
                if time.monotonic() >= next_tend:
                    next_tend = time.monotonic() + TEND_EVERY_S
                    self._tend()
            except LatentlineError as error:  # the broker is away: the jobs go on, the leases tell
                next_tend = time.monotonic() + self._lease_s
                log.warning("heartbeat: %s", error.message)
            except Exception:
                log.exception("heartbeat failed")

    def _beat(self) -> None:
        with self._lock:
            tracked = list(self._tracked)
        if self._stalled_for() > self._stall_s:  # those who upload need no engine any more
            tracked = [one for one in tracked if one.uploading]
            if not tracked:
                self._give_up()
        if not tracked:
            return
        verdicts = self._records.beat([self._describe(one) for one in tracked])
        for one, verdict in zip(tracked, verdicts, strict=True):
            if verdict is not Verdict.GO:
                one.stop(verdict.value)
        for one, verdict in zip(tracked, verdicts, strict=True):  # after all have heard: a checkpoint may take long, or fail
            if verdict is Verdict.GO:
                self.save(one)

    def _describe(self, one: Tracked) -> Beat:
        request = one.request
        record = one.claim.record  # as it was claimed: at the step from which it goes on
        beat = Beat(job_id=record.id, token=one.claim.token, phase=Phase.ENCODING, step=record.step, lease_s=self._lease_s)
        if request is None:
            return beat
        step = max(record.step, _own_steps(one, request.step))
        preview = request.preview
        if preview and preview.step > one.shown:
            one.shown = preview.step
            beat = replace(beat, previews=tuple(encode_preview(image) for image in preview.pixels))
        return replace(beat, phase=Phase.UPLOADING if one.uploading else request.phase, step=step, batch_jobs=request.batch_jobs)


def _own_steps(tracked: Tracked, calls: int) -> int:
    """Network calls in the job's own steps: some samplers call the network more than once for each."""
    assert tracked.request is not None  # there are calls only then
    return calls * tracked.claim.record.num_steps // tracked.request.num_steps
