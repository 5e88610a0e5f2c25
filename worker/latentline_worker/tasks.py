"""What a wake-up does, on a task thread: claim -> engine -> deliver -> settle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from latentline.errors import BrokerUnavailable, InvalidRequest, LatentlineError, StaleToken
from latentline.jobs import Claim, ImageRef, JobError, JobRecord, JobRequest, Phase, Status
from latentline.records import Records

from .delivery import Delivery
from .engine.conditioning import Conditioner
from .engine.engine import Engine
from .engine.request import Cancelled, Work
from .heartbeat import Heartbeat, Tracked
from .models.base import Family
from .samplers import CompileError, sampler_table

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_TRIES = 20  # with a second between them: a settle outlasts a broker's restart


class Callbacks(Protocol):
    """Who announces status changes (``callbacks.CallbackSender``)."""

    def notify(self, record: JobRecord, event_type: str) -> None: ...


class JobRunner:
    """Runs one job from wake-up to settled record; safe to call from many task threads."""

    def __init__(
        self,
        worker: str,
        family: Family,
        records: Records,
        engine: Engine,
        conditioner: Conditioner,
        delivery: Delivery,
        heartbeat: Heartbeat,
        callbacks: Callbacks,
        lease_s: float,
    ) -> None:
        self._worker, self._family, self._records, self._engine = worker, family, records, engine
        self._conditioner, self._delivery, self._heartbeat, self._callbacks = conditioner, delivery, heartbeat, callbacks
        self._lease_s = lease_s

    def run(self, job_id: str) -> None:
        """Do the job if it is still to be done; every outcome ends in the record, none in an exception."""
        claim = self._insist(lambda: self._records.claim(job_id, self._worker, self._lease_s))
        if claim is None:
            return
        log.info("job %s: started, attempt %d", job_id, claim.record.attempt)
        self._callbacks.notify(claim.record, "job.running")
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
            if stop.reason == "shutdown":
                self._records.release(job_id, claim.token)
                log.info("job %s: back to the queue, this worker shuts down", job_id)
                return
            status, error = _stopped(stop.reason)
        except Exception as problem:
            status, error = Status.FAILED, _job_error(problem)
            expected = isinstance(problem, LatentlineError)
            log.log(logging.INFO if expected else logging.ERROR, "job %s: %s", job_id, error.code, exc_info=not expected)
        finally:
            self._heartbeat.forget(tracked)
        self._settle(claim, status, tuple(images), error, timings)

    def _generate(self, tracked: Tracked, timings: dict[str, float]) -> tuple[ImageRef, ...]:
        watch = _Stopwatch(timings)
        work = self.prepare(tracked.claim.record.id, tracked.claim.record.request)
        watch.lap("encoding_s")
        request = self._engine.submit(work)
        tracked.attach(request)
        latents = request.future.result()
        watch.lap("denoising_s")
        timings["denoise_steps"], timings["shared_steps"] = request.step, request.shared_steps
        tracked.phase = Phase.DECODING
        pixels = self._delivery.decode(latents)
        watch.lap("decoding_s")
        if tracked.stop_reason:
            raise Cancelled(tracked.stop_reason)
        tracked.phase = Phase.UPLOADING
        refs = self._delivery.upload(tracked.claim, pixels)
        watch.lap("uploading_s")
        return refs

    def prepare(self, job_id: str, request: JobRequest) -> Work:
        """A request as work for the engine.

        Raises:
            InvalidRequest: the model or its scheduler refuses it.
        """
        info = self._family.info
        width, height = info.size_of(request)
        try:
            table = sampler_table(request.scheduler, self._family.scheduler_config, request.num_inference_steps)
        except CompileError as error:
            raise InvalidRequest("scheduler", request.scheduler, str(error)) from error
        used, limit = self._family.count_tokens(request.prompt)
        if used > limit:
            log.info("job %s: the prompt has %d tokens, %s reads the first %d", job_id, used, info.id, limit)
        guided = request.guidance_scale > 1  # as in diffusers: at 1 and below there is nothing to guide
        return Work(
            job_id=job_id,
            latent_shape=self._family.latent_shape(width, height),
            table=table,
            guidance_scale=request.guidance_scale,
            seeds=tuple(request.seed + i for i in range(request.num_images)),
            cond=self._conditioner.encode(request.prompt),
            uncond=self._conditioner.encode(request.negative_prompt) if guided else None,
            priority=request.priority,
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
        self._callbacks.notify(record, f"job.{status.value}")

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


class _Stopwatch:
    def __init__(self, timings: dict[str, float]) -> None:
        self._timings, self._last = timings, time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._timings[name] = round(now - self._last, 4)
        self._last = now


def _stopped(reason: str) -> tuple[Status, JobError | None]:
    if reason == "expired":
        return Status.FAILED, JobError(code="deadline_exceeded", message="the deadline passed before the job ended")
    return Status.CANCELLED, None


def _job_error(problem: Exception) -> JobError:
    if isinstance(problem, LatentlineError):
        return JobError(code=problem.code, message=problem.message)
    # No internals in a client's answer: the worker's log has the traceback.
    return JobError(code="internal_error", message="the worker failed on this job; its log has the details")
