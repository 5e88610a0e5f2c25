"""What a wake-up does, on a task thread: claim -> engine -> deliver -> settle."""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from latentline.errors import BrokerUnavailable, InvalidRequest, JobNotFound, LatentlineError, OutOfMemory, ServiceUnavailable, StaleToken
from latentline.jobs import Claim, ImageRef, JobError, JobRecord, Status
from latentline.records import Backoff, Records
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.failures import out_of_memory
from latentline_worker.engine.request import Cancelled, Request, Work
from latentline_worker.images.upload import Delivery
from latentline_worker.models.base import Family
from latentline_worker.samplers import CompileError, sampler_table

from .exclusive import Gate
from .leases import Heartbeat, Tracked

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_TRIES = 60  # with a second between them: a settle outlasts a broker's restart
FIRST_BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0  # before another try after an error


class JobRunner:
    """Runs one job from wake-up to settled record; safe to call from many task threads."""

    def __init__(
        self,
        worker: str,
        family: Family,
        records: Records,
        engine: Engine,
        delivery: Delivery,
        heartbeat: Heartbeat,
        lease_s: float,
        stall_s: float = float("inf"),
    ) -> None:
        self._worker, self._family, self._records, self._engine = worker, family, records, engine
        self._delivery, self._heartbeat, self._lease_s, self._stall_s = delivery, heartbeat, lease_s, stall_s
        self._gate = Gate()

    def run(self, job_id: str) -> None:
        """Do the job if it is still to be done. Every outcome ends in the record; an exception only when the broker stays away."""
        while self._engine.stalled_for() > self._stall_s:
            time.sleep(1)  # an engine that is wedged takes no more jobs: the process ends when nothing uploads any more
        alone = self._insist(lambda: self._records.suspect(job_id))
        if alone:
            log.warning("job %s: workers were lost with it, so it runs alone", job_id)
        claim_id = uuid.uuid4().hex  # one claim, however often it is asked for
        with self._gate.pass_(alone):
            try:
                claim = self._insist(lambda: self._records.claim(job_id, self._worker, self._lease_s, alone=alone, claim_id=claim_id))
            except JobNotFound as error:
                reason = error.message
                log.warning("job %s: %s", job_id, reason)
                self._insist(lambda: self._records.bury(job_id, "message", reason, job_id=job_id))
                return
            if claim is not None:
                log.info("job %s: started, attempt %d", job_id, claim.record.attempt)
                self._do(claim)

    def _do(self, claim: Claim) -> None:
        job_id = claim.record.id
        tracked = self._heartbeat.track(claim)
        timings: dict[str, float] = {}
        images: Sequence[ImageRef] = ()
        status, error = Status.SUCCEEDED, None
        try:
            images = self._generate(tracked, timings)
        except Cancelled as stop:
            if stop.reason == "stale":
                log.warning("job %s: another worker owns it now", job_id)
                return
            if stop.reason == "lost":
                log.warning("job %s: left to other workers, who take it when its lease has run out", job_id)
                return
            if stop.reason == "shutdown":
                self._insist(lambda: self._heartbeat.save(tracked))
                self._insist(lambda: self._records.release(job_id, claim.token))
                log.info("job %s: back to the queue at step %d, this worker shuts down", job_id, tracked.saved_step)
                return
            status, error = _stopped(stop.reason)
        except Exception as problem:
            status, error = Status.FAILED, _job_error(problem)
            expected = isinstance(problem, LatentlineError)
            log.log(logging.INFO if expected else logging.ERROR, "job %s: %s", job_id, error.code, exc_info=not expected)
            if isinstance(problem, ServiceUnavailable) or not (expected or out_of_memory(problem)):
                self._insist(lambda: self._heartbeat.save(tracked))
                self._retry(claim, error)
                return
        finally:
            self._heartbeat.forget(tracked)
        self._settle(claim, status, tuple(images), error, timings)

    def _generate(self, tracked: Tracked, timings: dict[str, float]) -> tuple[ImageRef, ...]:
        record = tracked.claim.record
        work = self.prepare(record)
        if record.attempt > 1:
            resume = Checkpoint.from_bytes(self._insist(lambda: self._records.load_checkpoint(record.id)), work)
            work = replace(work, resume=resume)
            log.info("job %s: goes on from network call %d", record.id, resume.step if resume else 0)
        request = self._engine.submit(work)
        tracked.attach(request)
        try:
            pixels = request.result().numpy()
        finally:
            timings.update(_timings(request))
        used, read = request.prompt_tokens
        if used > read:
            log.info("job %s: the prompt has %d tokens, %s reads the first %d", record.id, used, self._family.info.id, read)
        if tracked.stop_reason:
            raise Cancelled(tracked.stop_reason)
        tracked.uploading = True
        started = time.monotonic()
        refs = self._delivery.upload(tracked.claim, list(pixels))
        timings["uploading_s"] = round(time.monotonic() - started, 4)
        return refs

    def prepare(self, record: JobRecord) -> Work:
        """A claimed job as work for the engine.

        Raises:
            InvalidRequest: the model or its scheduler refuses it.
        """
        request, info = record.request, self._family.info
        width, height = info.size_of(request)
        try:
            table = sampler_table(request.scheduler, self._family.scheduler_config, request.num_inference_steps)
        except CompileError as error:
            raise InvalidRequest("scheduler", request.scheduler, str(error)) from error
        deadline = None
        if request.deadline_s and record.started_at:  # both on the broker's clock; what is left of it counts from now
            deadline = time.monotonic() + record.created_at + request.deadline_s - record.started_at
        return Work(
            job_id=record.id,
            model=info.id,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            latent_shape=self._family.latent_shape(width, height),
            table=table,
            guidance_scale=request.guidance_scale,
            seeds=tuple(request.seed + i for i in range(request.num_images)),
            priority=request.priority,
            tenant=request.tenant,
            deadline=deadline,
            preview_every=request.preview_every,
        )

    def _settle(
        self, claim: Claim, status: Status, images: tuple[ImageRef, ...], error: JobError | None, timings: dict[str, float]
    ) -> None:
        job_id = claim.record.id
        try:
            record = self._insist(lambda: self._records.settle(job_id, claim.token, status, images=images, error=error, timings=timings))
        except StaleToken:
            log.warning("job %s: settled by another worker", job_id)
            return
        log.info("job %s: %s in %.2f s", job_id, status.value, (record.finished_at or 0) - (record.started_at or 0))

    def _retry(self, claim: Claim, error: JobError) -> None:
        job_id = claim.record.id
        # Jitter: what failed together should not come back together.
        backoff = Backoff(FIRST_BACKOFF_S, MAX_BACKOFF_S, random.uniform(0.5, 1))
        try:
            status, delay_s = self._insist(lambda: self._records.retry(job_id, claim.token, error, backoff))
        except StaleToken:
            log.warning("job %s: another worker owns it now", job_id)
            return
        log.info("job %s: %s after an error%s", job_id, status.value, f", next try in {delay_s:.1f} s" if status is Status.QUEUED else "")

    @staticmethod
    def _insist(action: Callable[[], T]) -> T:
        """Try again while the broker is away: the work behind a settle is too dear to drop."""
        for attempt in range(SETTLE_TRIES):
            try:
                return action()
            except BrokerUnavailable:
                if attempt == SETTLE_TRIES - 1:
                    raise
                time.sleep(1)
        raise BrokerUnavailable("the broker does not answer")


def _timings(request: Request) -> dict[str, float]:
    """How long the phases in the engine took, and what the denoising shared."""
    phases = {
        "encoding_s": ("submitted", "joined"),
        "denoising_s": ("joined", "denoised"),
        "decoding_s": ("denoised", "decoded"),
    }
    seconds = {name: round(request.seconds(*moments), 4) for name, moments in phases.items()}
    resumed = request.work.resume.step if request.work.resume else 0
    return {**seconds, "denoise_steps": request.step - resumed, "shared_steps": request.shared_steps, "resumed_from": resumed}


def _stopped(reason: str) -> tuple[Status, JobError | None]:
    if reason == "expired":
        return Status.FAILED, JobError(code="deadline_exceeded", message="the deadline passed before the job ended")
    return Status.CANCELLED, None


def _job_error(problem: Exception) -> JobError:
    if isinstance(problem, LatentlineError):
        return JobError(code=problem.code, message=problem.message)
    if out_of_memory(problem):
        return JobError(code=OutOfMemory.code, message="the job does not fit into the worker's memory")
    # No internals in a client's answer: the worker's log has the traceback.
    return JobError(code="internal_error", message="the worker failed on this job; its log has the details")
