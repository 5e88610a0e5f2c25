"""What a wake-up does, on a task thread: claim, generate, upload, settle."""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from latentline.errors import BrokerUnavailable, InvalidRequest, JobNotFound, LatentlineError, StaleToken
from latentline.jobs import Claim, ImageRef, JobError, JobRecord, Status
from latentline.logs import about_job
from latentline.records import Backoff, Records
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.request import Cancelled, Request, Work
from latentline_worker.images.upload import Uploader
from latentline_worker.models.base import Family
from latentline_worker.samplers import CompileError

from . import outcome
from .cut_texts import cut_texts
from .exclusive import SharedExclusiveLock
from .leased_job import LeasedJob
from .leases import Leases
from .making import made_with
from .metrics import JobMetrics
from .outcome import CancelRequested, Failed, HandOver, NotOurs, Outcome, Succeeded, TryAgain
from .roster import Roster
from .spans import AttemptSpans

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

T = TypeVar("T")
Timings = dict[str, float]

SETTLE_TRIES = 60  # one second apart: long enough for a broker to restart
FIRST_BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0  # before another try after an error


class JobRunner:
    """Runs one job from wake-up to settled record; safe to call from many task threads.

    Args:
        worker: the name of this worker in the records.
        roster: the models.
        lease_s: the first lease of a claim; ``leases`` renews it.
        engine_stalled: whether the engine counts as hung; then no further job is claimed.
        metrics: told what becomes of each job.
        tracer: makes the spans of attempts; None makes none.
    """

    def __init__(
        self,
        worker: str,
        roster: Roster,
        records: Records,
        engine: Engine,
        uploader: Uploader,
        leases: Leases,
        lease_s: float,
        engine_stalled: Callable[[], bool] = lambda: False,
        metrics: JobMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._spans = AttemptSpans(tracer, records)
        self._worker, self._roster, self._records, self._engine = worker, roster, records, engine
        self._uploader, self._leases, self._lease_s, self._engine_stalled = uploader, leases, lease_s, engine_stalled
        self._metrics = metrics or JobMetrics()
        self._lock = SharedExclusiveLock()

    def run(self, job_id: str) -> None:
        """Do the job if it is still to be done. Every outcome ends in the record.

        Raises:
            BrokerUnavailable: the broker stayed away for ``SETTLE_TRIES`` seconds.
        """
        while self._engine_stalled():
            time.sleep(1)  # the watchdog ends the process once nothing uploads any more; the unacknowledged message is kept
        alone = self._insist(lambda: self._records.suspect(job_id))
        if alone:
            log.warning("job %s: workers were lost with it, so it runs alone", job_id)
        with self._lock.exclusive() if alone else self._lock.shared():
            claim_began = time.monotonic()
            claim = self._claim(job_id, alone)
            if claim is None:
                return
            timings: Timings = {}
            with about_job(job_id, claim.record.traceparent), self._leases.hold(claim) as job:
                log.info("job %s: started, attempt %d", job_id, claim.record.attempt)
                job.claim_began = claim_began
                self._conclude(job, self._attempt(job, timings), timings)

    def _claim(self, job_id: str, alone: bool) -> Claim | None:
        """Claim the job; None if there is nothing to do for it. A job that cannot be read becomes a dead letter."""
        claim_id = uuid.uuid4().hex  # of this claim: repeating it after a lost answer does not claim twice
        try:
            return self._insist(lambda: self._records.claim(job_id, self._worker, self._lease_s, alone=alone, claim_id=claim_id))
        except JobNotFound as error:
            reason = error.message
        log.warning("job %s: %s", job_id, reason)
        self._insist(lambda: self._records.bury(job_id, "message", reason, job_id=job_id))
        return None

    def _attempt(self, job: LeasedJob, timings: Timings) -> Outcome:
        """Generate and upload the images; every exception becomes an outcome."""
        try:
            return Succeeded(self._generate(job, timings))
        except Exception as problem:
            ended = outcome.of_exception(problem, job.uploading)
            if isinstance(ended, Failed | TryAgain) and not isinstance(problem, Cancelled):
                expected = isinstance(problem, LatentlineError)
                level = logging.INFO if expected else logging.ERROR
                log.log(level, "job %s: %s", job.claim.record.id, ended.error.code, exc_info=problem if not expected else None)
            return ended

    def _conclude(self, job: LeasedJob, ended: Outcome, timings: Timings) -> None:
        """Write the outcome into the record, or leave the record alone where it is no longer this worker's."""
        job_id, token = job.claim.record.id, job.claim.token
        match ended:
            case Succeeded(images):
                self._settle(job, Status.SUCCEEDED, images, None, timings)
            case Failed(error):
                self._settle(job, Status.FAILED, (), error, timings)
            case CancelRequested():
                self._settle(job, Status.CANCELLED, (), None, timings)
            case TryAgain(error):
                self._save_checkpoint(job)
                self._retry(job, error)
            case HandOver(reason):
                self._save_checkpoint(job)
                with self._spans.ending(job) as ending:
                    if self._insist(lambda: self._records.release(job_id, token, ending.account)):
                        ending.outcome = "handed_over"
                log.info("job %s: back to the queue at step %d: %s", job_id, job.checkpoint_step, reason)
            case NotOurs(reason):
                log.warning("job %s: %s", job_id, reason)

    def _save_checkpoint(self, job: LeasedJob) -> None:
        """Write the newest checkpoint if possible. Without it some steps are repeated; the job still has to leave this worker."""
        try:
            self._insist(lambda: self._leases.save_checkpoint(job))
        except LatentlineError as error:
            log.warning("job %s: its last checkpoint could not be written: %s", job.claim.record.id, error.message)

    def _generate(self, job: LeasedJob, timings: Timings) -> tuple[ImageRef, ...]:
        with self._model(job.claim.record.request.model) as family:
            pixels = self._denoise(job, family, timings)
        assert job.made is not None  # there are pixels
        job.uploading = True
        job.upload_began = time.monotonic()
        refs = self._uploader.upload(job.claim, list(pixels), job.made)
        job.upload_ended = time.monotonic()
        timings["uploading_s"] = round(job.upload_ended - job.upload_began, 4)
        return refs

    @contextmanager
    def _model(self, model: str) -> Iterator[Family]:
        """The model in memory, for the time of the block.

        Raises:
            InvalidRequest: this worker does not serve it.
            Cancelled: it is not in memory now.
        """
        if model not in self._roster.ids:
            raise InvalidRequest("model", model, f"one of: {', '.join(self._roster.ids)}")
        with self._roster.use(model) as family:
            yield family

    def _denoise(self, job: LeasedJob, family: Family, timings: Timings) -> npt.NDArray[np.uint8]:
        """(images, height, width, 3) pixels of a job."""
        record = job.claim.record
        work = prepare(family, record, job.deadline)
        if record.attempt > 1:
            resume = Checkpoint.from_bytes(self._insist(lambda: self._records.load_checkpoint(record.id)), work)
            work = replace(work, resume=resume)
            log.info("job %s: continues from network call %d", record.id, resume.step if resume else 0)
        request = self._engine.submit(work)
        job.attach(request)
        try:
            pixels: npt.NDArray[np.uint8] = request.result().numpy()
        finally:
            timings.update(_timings(request))
            job.made = made_with(request, family, self._engine.fixed_rows)
        if warnings := cut_texts(request):
            self._insist(lambda: self._records.warn(record.id, job.claim.token, warnings))
        if job.stop_reason:
            raise Cancelled(job.stop_reason)
        return pixels

    def _settle(self, job: LeasedJob, status: Status, images: tuple[ImageRef, ...], error: JobError | None, timings: Timings) -> None:
        job_id, token = job.claim.record.id, job.claim.token
        try:
            with self._spans.ending(job) as ending:
                told: dict[str, Any] = {"images": images, "error": error, "timings": timings, "account": ending.account}
                record = self._insist(lambda: self._records.settle(job_id, token, status, **told))
                ending.outcome, ending.error = status.value, error.code if error else ""
        except StaleToken:
            log.warning("job %s: settled by another worker", job_id)
            self._metrics.fenced.inc()
            return
        self._metrics.ended(job.claim.record, status, timings)
        if error:
            self._metrics.failed(error.code)
        log.info("job %s: %s in %.2f s", job_id, status.value, (record.finished_at or 0) - (record.started_at or 0))

    def _retry(self, job: LeasedJob, error: JobError) -> None:
        job_id, token = job.claim.record.id, job.claim.token
        # Jitter, so that jobs that failed together do not come back together.
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S, random.uniform(0.5, 1))
        try:
            with self._spans.ending(job) as ending:
                status, delay_s = self._insist(lambda: self._records.retry(job_id, token, error, backoff, ending.account))
                ending.outcome, ending.error = "error" if status is Status.QUEUED else status.value, error.code
        except StaleToken:
            log.warning("job %s: another worker owns it now", job_id)
            self._metrics.fenced.inc()
            return
        self._metrics.failed(error.code)
        if status is Status.QUEUED:
            self._metrics.retries.inc()
        else:
            self._metrics.ended(job.claim.record, status, {})
        log.info("job %s: %s after an error%s", job_id, status.value, f", next try in {delay_s:.1f} s" if status is Status.QUEUED else "")

    @staticmethod
    def _insist(action: Callable[[], T]) -> T:
        """Repeat an action while the broker is away: the work behind it costs more than waiting."""
        for _ in range(SETTLE_TRIES - 1):
            try:
                return action()
            except BrokerUnavailable:
                time.sleep(1)
        return action()


def prepare(family: Family, record: JobRecord, deadline: float | None = None) -> Work:
    """A claimed job as work for the engine.

    Args:
        family: its model.
        deadline: of the job, ``time.monotonic()``.

    Raises:
        InvalidRequest: the model or its scheduler refuses the job.
    """
    try:
        return Work.of(family, record.request, record.id, deadline=deadline)
    except CompileError as error:
        raise InvalidRequest("scheduler", record.request.scheduler, str(error)) from error


def _timings(request: Request) -> Timings:
    """How long the phases in the engine took, and how many steps were shared with other jobs."""
    phases = {
        "encoding_s": ("submitted", "joined"),
        "denoising_s": ("joined", "denoised"),
        "decoding_s": ("denoised", "decoded"),
    }
    seconds = {name: round(request.seconds(*moments), 4) for name, moments in phases.items()}
    resumed = request.work.resume.step if request.work.resume else 0
    return {**seconds, "denoise_steps": request.step - resumed, "shared_steps": request.shared_steps, "resumed_from": resumed}
