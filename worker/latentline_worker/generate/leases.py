"""The leases thread: renews the leases of the jobs in flight, reports their progress, and hears what became of them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from latentline.errors import LatentlineError
from latentline.jobs import Claim, Phase
from latentline.records import Beat, Records, Verdict
from latentline_worker.engine.checkpoint import Checkpoint, CheckpointSchedule
from latentline_worker.engine.request import Request
from latentline_worker.images.encode import encode_preview

log = logging.getLogger(__name__)

# Between two beats. The engine hears of a cancel after this time and the beat before it, with its checkpoints: up to
# 32 MB for each job.
INTERVAL_S = 0.1
RELEASE_S = 5.0  # how long a broker that does not answer may delay the end of the process


@dataclass(eq=False)
class LeasedJob:
    """One claimed job as the leases thread sees it. ``stop_reason`` is set once and never taken back."""

    claim: Claim
    request: Request | None = None
    uploading: bool = False
    preview_step: int = 0  # network call of the newest preview that was sent
    checkpoint_call: int = 0  # network call of the newest checkpoint that was looked at
    checkpoint_step: int = 0  # the same in the job's own steps, of the newest checkpoint that was written
    stop_reason: str | None = None
    checkpoint_lock: threading.Lock = field(default_factory=threading.Lock)  # held while a checkpoint is written
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, request: Request) -> None:
        """Report on this engine request from now on, and stop it when the job is stopped, or was stopped before."""
        with self._lock:
            self.request = request
            if self.stop_reason:
                request.cancel(self.stop_reason)

    def stop(self, reason: str) -> None:
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            if self.request:
                self.request.cancel(reason)

    def own_steps(self, calls: int) -> int:
        """Network calls as steps of the job: some samplers call the network more than once per step."""
        assert self.request is not None  # only a request makes network calls
        return calls * self.claim.record.num_steps // self.request.num_steps


class Leases:
    """One thread; each beat is one round trip for all jobs of the process, then their checkpoints.

    The thread never waits for the device: what it sends of a request lies in host memory.

    Args:
        records: the job records.
        lease_s: for how long each beat renews a lease.
        engine_stalled: whether the engine counts as hung. Then only jobs that need no engine any more keep their leases;
            the others go to other workers when theirs run out.
        touch_liveness_file: called at every beat, also while the broker is away: the process is well.
        broker_lost: called when the broker does not answer.
        checkpoint_schedule: told what checkpoints cost.
    """

    def __init__(
        self,
        records: Records,
        lease_s: float,
        engine_stalled: Callable[[], bool] = lambda: False,
        touch_liveness_file: Callable[[], None] = lambda: None,
        broker_lost: Callable[[], None] = lambda: None,
        checkpoint_schedule: CheckpointSchedule | None = None,
    ) -> None:
        self._records, self._lease_s, self._engine_stalled = records, lease_s, engine_stalled
        self._touch_liveness_file, self._broker_lost, self._schedule = touch_liveness_file, broker_lost, checkpoint_schedule
        self._jobs: set[LeasedJob] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def hold(self, claim: Claim) -> Iterator[LeasedJob]:
        """Keep the lease of a claimed job for the duration of the block."""
        job = LeasedJob(claim)
        with self._lock:
            self._jobs.add(job)
        try:
            yield job
        finally:
            with self._lock:
                self._jobs.discard(job)

    def uploads_left(self) -> bool:
        """Whether a job is being uploaded."""
        with self._lock:
            return any(job.uploading for job in self._jobs)

    def release_all(self) -> None:
        """Give every job back to the queue, because the process ends. That does not count as a crash of the job.

        Never raises: a job that cannot be given back goes to another worker when its lease runs out.
        """
        with self._lock:
            jobs = list(self._jobs)
        started = time.monotonic()
        for job in jobs:
            try:
                self._records.release(job.claim.record.id, job.claim.token)
            except Exception as error:
                log.warning("job %s: cannot be given back (%s), its lease has to run out", job.claim.record.id, type(error).__name__)
                # A connection that was lost costs one job. A broker that hangs costs seconds for each.
                if time.monotonic() - started > RELEASE_S:
                    return

    def save_checkpoint(self, job: LeasedJob) -> None:
        """Write the job's newest checkpoint, unless that was done already. Called by the leases thread and by task threads.

        A checkpoint that cannot be written for a reason of its own, such as no memory to compress it, is logged and left out.

        Raises:
            LatentlineError: the broker does not take it.
        """
        # The newest one is read under the lock: of two threads the later one must not write the older checkpoint.
        with job.checkpoint_lock:
            request = job.request
            checkpoint = request.checkpoint if request else None
            if request is None or checkpoint is None or checkpoint.step <= job.checkpoint_call:
                return
            started = time.thread_time()  # what it takes of a core; waiting for the broker costs the engine nothing
            try:
                self._write(job, request, checkpoint)
            except LatentlineError:
                raise
            except Exception:
                log.exception("job %s: no checkpoint of network call %d", job.claim.record.id, checkpoint.step)
            job.checkpoint_call = checkpoint.step  # Also when refused, too large or failed: do not retry the same checkpoint.
            if self._schedule:
                self._schedule.record_written(time.thread_time() - started)

    def _write(self, job: LeasedJob, request: Request, checkpoint: Checkpoint) -> None:
        data = checkpoint.to_bytes(request.work)
        step = job.own_steps(checkpoint.step)
        if data is not None and self._records.checkpoint(job.claim.record.id, job.claim.token, step, data):
            job.checkpoint_step = step

    def beat(self) -> None:
        """One round: renew, report, pass verdicts on to the engine, write checkpoints."""
        with self._lock:
            jobs = list(self._jobs)
        if self._engine_stalled():
            jobs = [job for job in jobs if job.uploading]
        if not jobs:
            return
        verdicts = self._records.beat([self._report(job) for job in jobs])
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is not Verdict.GO:
                job.stop(verdict.value)
        # Only after every job has heard its verdict: writing a checkpoint may take long, or fail.
        for job, verdict in zip(jobs, verdicts, strict=True):
            if verdict is Verdict.GO:
                self.save_checkpoint(job)

    def _loop(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            self._touch_liveness_file()
            try:
                self.beat()
            except LatentlineError as error:  # the jobs go on; whether they keep their leases shows when the broker is back
                log.warning("leases: %s", error.message)
                self._broker_lost()
            except Exception:
                log.exception("leases: a beat failed")

    def _report(self, job: LeasedJob) -> Beat:
        request = job.request
        record = job.claim.record  # as it was claimed, so its step is the one from which the job continues
        beat = Beat(job_id=record.id, token=job.claim.token, phase=Phase.ENCODING, step=record.step, lease_s=self._lease_s)
        if request is None:
            return beat
        step = max(record.step, job.own_steps(request.step))
        preview = request.preview
        if preview and preview.step > job.preview_step:
            job.preview_step = preview.step
            beat = replace(beat, previews=tuple(encode_preview(image) for image in preview.pixels))
        return replace(beat, phase=Phase.UPLOADING if job.uploading else request.phase, step=step, batch_jobs=request.batch_jobs)
