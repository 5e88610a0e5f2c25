"""One claimed job as the leases thread sees it: what it has to report and when, and why it was stopped."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from latentline.jobs import Claim, Phase
from latentline.provenance import Made
from latentline.records import Beat
from latentline_worker.engine.request import Preview, Request
from latentline_worker.images.encode import encode_preview

# How much of the lease's length passes between two renewals, so that two may fail before the job is lost.
RENEWED_AFTER = 1 / 3


@dataclass(eq=False)
class LeasedJob:
    """``stop_reason`` is set once and never taken back.

    Args:
        claim: what the worker holds.
        deadline: of the job, on the clock of the leases; None without one.
    """

    claim: Claim
    deadline: float | None = None
    request: Request | None = None
    uploading: bool = False
    made: Made | None = None  # what the engine made its pictures with
    claimed_at: float = field(default_factory=time.monotonic)
    claim_began: float = field(default_factory=time.monotonic)  # when the worker asked for it
    upload_began: float | None = None  # time.monotonic(), and so below
    upload_ended: float | None = None
    checkpoints: list[tuple[int, float]] = field(default_factory=list)  # step, and when the broker had it
    checkpoint_call: int = 0  # network call of the newest checkpoint that was looked at
    checkpoint_step: int = 0  # the same in the job's own steps, of the newest checkpoint that was written
    stop_reason: str | None = None
    checkpoint_lock: threading.Lock = field(default_factory=threading.Lock)  # held while a checkpoint is written
    _reported: tuple[Phase, int] | None = None  # phase and step that the record holds; None before the first report
    _preview_step: int = 0  # network call of the newest preview that was sent
    _preview_in_report: int = 0  # and of the one in the last report, which the broker may not have taken
    _progress_due: float = float("-inf")  # when progress within a phase may be reported again
    _renewal_due: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, request: Request) -> None:
        """Report on this engine request from now on, and stop it when the job is stopped, or was stopped before."""
        with self._lock:
            self.request = request
            if self.stop_reason:
                request.cancel(self.stop_reason)

    def stop(self, reason: str) -> None:
        """Stop the job, in the engine too. The first reason counts."""
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            if self.request:
                self.request.cancel(reason)

    def own_steps(self, calls: int) -> int:
        """Network calls as steps of the job: some samplers call the network more than once per step."""
        assert self.request is not None  # only a request makes network calls
        return calls * self.claim.record.num_steps // self.request.num_steps

    def report(self, now: float, lease_s: float) -> Beat | None:
        """What has to be sent now; None while there is nothing.

        The first report is due at once: its answer tells of a cancel that came before this worker listened. A new phase and a new
        preview are due at once as well; steps within a phase when :meth:`reported` says so, a renewal when its time has come.
        """
        phase, step = self._progress()
        preview = self._new_preview()
        renewal = now >= self._renewal_due
        new_phase = self._reported is None or self._reported[0] is not phase
        new_step = self._reported != (phase, step) and now >= self._progress_due
        if not (renewal or new_phase or new_step or preview):
            return None
        self._preview_in_report = preview.step if preview else self._preview_step
        return Beat(
            job_id=self.claim.record.id,
            token=self.claim.token,
            phase=phase,
            step=step,
            lease_s=lease_s if renewal else 0.0,
            batch_jobs=self.request.batch_jobs if self.request else 0,
            previews=tuple(encode_preview(image) for image in preview.pixels) if preview else (),
        )

    def reported(self, beat: Beat, now: float, progress_every_s: float) -> None:
        """Note that the broker has taken a report; the next steps within a phase are due after ``progress_every_s``."""
        self._reported = (beat.phase, beat.step)
        self._progress_due = now + progress_every_s
        if beat.lease_s:
            self._renewal_due = now + beat.lease_s * RENEWED_AFTER
        self._preview_step = self._preview_in_report

    def renew_soon(self) -> None:
        """Renew at the next beat: the broker was away, and may have lost what it was told."""
        self._renewal_due = float("-inf")

    def _progress(self) -> tuple[Phase, int]:
        record = self.claim.record  # as it was claimed, so its step is the one from which the job continues
        if self.request is None:
            return Phase.ENCODING, record.step
        step = max(record.step, self.own_steps(self.request.step))
        return Phase.UPLOADING if self.uploading else self.request.phase, step

    def _new_preview(self) -> Preview | None:
        preview = self.request.preview if self.request else None
        return preview if preview and preview.step > self._preview_step else None
