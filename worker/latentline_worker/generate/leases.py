"""The leases thread: renews the leases of the jobs in flight, reports their progress, and ends them at their deadline."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from latentline.errors import LatentlineError
from latentline.jobs import Claim
from latentline.records import Records, Signal, Verdict
from latentline_worker.engine.checkpoint import Checkpoint, CheckpointSchedule
from latentline_worker.engine.request import Request

from .leased_job import LeasedJob
from .metrics import JobMetrics

log = logging.getLogger(__name__)

INTERVAL_S = 0.1  # between two beats
# Steps within a phase are reported at this rate, over all jobs of the process: ten times a second for one job, once for
# sixteen. More would cost the broker more than the transitions of the jobs do.
PROGRESS_PER_S = 16
RELEASE_S = 5.0  # how long a broker that does not answer may delay the end of the process


class Leases:
    """One thread; each beat is one call for the jobs that have something to report, if any, then their checkpoints.

    The thread never waits for the device: what it sends of a request lies in host memory.

    Args:
        records: the job records.
        lease_s: for how long a lease is renewed.
        engine_stalled: whether the engine counts as hung. Then only jobs that need no engine any more keep their leases;
            the others go to other workers when theirs run out.
        touch_liveness_file: called at every beat, also while the broker is away: the process is well.
        broker_lost: called when the broker does not answer.
        checkpoint_schedule: told what checkpoints cost.
        clock: seconds that never go back.
        metrics: told of the checkpoints that were written.
    """

    def __init__(
        self,
        records: Records,
        lease_s: float,
        engine_stalled: Callable[[], bool] = lambda: False,
        touch_liveness_file: Callable[[], None] = lambda: None,
        broker_lost: Callable[[], None] = lambda: None,
        checkpoint_schedule: CheckpointSchedule | None = None,
        clock: Callable[[], float] = time.monotonic,
        metrics: JobMetrics | None = None,
    ) -> None:
        self._metrics = metrics or JobMetrics()
        self._records, self._lease_s, self._engine_stalled = records, lease_s, engine_stalled
        self._touch_liveness_file, self._broker_lost, self._schedule = touch_liveness_file, broker_lost, checkpoint_schedule
        self._clock = clock
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
        left_s = claim.deadline_in_s
        job = LeasedJob(claim, deadline=None if left_s is None else self._clock() + left_s)
        with self._lock:
            self._jobs.add(job)
        try:
            yield job
        finally:
            with self._lock:
                self._jobs.discard(job)

    def stop_job(self, signal: Signal) -> None:
        """Stop the job of a signal, if this process still holds it under the token that the signal is meant for."""
        with self._lock:
            jobs = [job for job in self._jobs if (job.claim.record.id, job.claim.token) == (signal.job_id, signal.token)]
        for job in jobs:
            job.stop(signal.verdict.value)

    def num_held(self) -> int:
        """Jobs that this worker holds now."""
        with self._lock:
            return len(self._jobs)

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
            job.checkpoints.append((step, time.monotonic()))
            self._metrics.checkpoint(len(data))

    def beat(self) -> None:
        """One round: end what is overdue, report and renew, pass verdicts on to the engine, write checkpoints.

        Raises:
            LatentlineError: the broker does not answer. Then every job counts as not reported.
        """
        with self._lock:
            jobs = list(self._jobs)
        now = self._clock()
        for job in jobs:
            if job.deadline is not None and now >= job.deadline:
                job.stop(Verdict.EXPIRED.value)
        if self._engine_stalled():
            jobs = [job for job in jobs if job.uploading]
        try:
            self._report(jobs, now)
        except LatentlineError:
            for job in jobs:
                job.renew_soon()
            raise
        # Only after every job has heard its verdict: writing a checkpoint may take long, or fail.
        for job in jobs:
            if job.stop_reason is None:
                self.save_checkpoint(job)

    def _report(self, jobs: Sequence[LeasedJob], now: float) -> None:
        """Send what the jobs have to report, and stop those of which the broker says so."""
        reports = [(job, beat) for job in jobs if (beat := job.report(now, self._lease_s))]
        if not reports:
            return
        verdicts = self._records.beat([beat for _, beat in reports])
        every_s = max(INTERVAL_S, len(jobs) / PROGRESS_PER_S)
        for (job, beat), verdict in zip(reports, verdicts, strict=True):
            job.reported(beat, now, every_s)
            if verdict is not Verdict.GO:
                job.stop(verdict.value)

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
