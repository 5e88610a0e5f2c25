"""The thread that owns the device: text in, pixels out, one denoise step at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch

from latentline.errors import ConfigurationError
from latentline.jobs import Phase
from latentline_worker.models.base import Family

from .checkpoint import CheckpointSchedule
from .clock import StepClock
from .conditioning import MICRO_BATCH, Conditioner
from .cost import CostModel
from .decoder import Decoder
from .failures import raise_if_lost, run_in_parts
from .lane import Lane
from .lanes import Lanes
from .memory import Memory
from .network import Network
from .planner import Planner
from .publisher import Publisher
from .request import Cancelled, LaneKey, Request, Work
from .warm_up import calibrate, measure

log = logging.getLogger(__name__)


class Engine:
    """Runs many jobs together. ``submit`` from any thread; each job's future gives its pixels.

    Text encoding and VAE decoding run on the same thread between denoise steps, one micro-batch at a time: a step
    waits for at most one of each, and no two threads compete for the device's cores or streams. Other threads are given
    host memory only (see :class:`~.host_copies.HostCopies`), so none of them ever waits for the device.

    Errors are charged to the job that caused them, and the others go on. A lost device is no job's error: it ends the
    thread (:meth:`stalled_for` is then infinite), and the jobs are resumed by other workers.

    Args:
        family: the loaded model.
        max_rows: network rows of one forward (a guided image needs two); memory and the measured costs may allow fewer.
        decode_batch: images of one VAE call.
        fixed_rows: the reproducible mode: run the network at exactly this many padded rows, and encode and decode one
            by one, so that a job's picture is bit-identical whatever ran beside it.
        memory_limit_bytes: what may be used beside the weights; by default most of what is free.
        graphs: capture CUDA graphs (no effect on a CPU).
        checkpoint_s: seconds between a job's checkpoints (``request.checkpoint``); None takes none except at :meth:`stop`.
    """

    def __init__(
        self,
        family: Family,
        max_rows: int = 64,
        decode_batch: int = 4,
        fixed_rows: int | None = None,
        memory_limit_bytes: int | None = None,
        graphs: bool = True,
        checkpoint_s: float | None = None,
    ) -> None:
        self.checkpoint_schedule = CheckpointSchedule(checkpoint_s) if checkpoint_s is not None else None
        self.progress_at = time.monotonic()  # when the engine last finished anything
        self.family = family
        self.planner = Planner(CostModel(fixed_rows or max_rows))
        self.clock = StepClock(family.device)
        self.memory = Memory(family, memory_limit_bytes)
        self.network = Network(family, fixed_rows, graphs)
        self.lanes = Lanes(lambda key: Lane(family, key, self.network, self.clock), self.network, self.memory)
        self._conditioner = Conditioner(family, 1 if fixed_rows else MICRO_BATCH)
        self._decoder = Decoder(family, 1 if fixed_rows else decode_batch, tiles_on_shortage=not fixed_rows)
        self._publisher = Publisher(family, self.checkpoint_schedule)
        self._arriving: list[Request] = []  # text not encoded yet, or no slot free
        self._active: list[Request] = []  # in a lane
        self._unfinished: set[Request] = set()  # those two, and all that are decoded or copied to the host
        self._launched: list[tuple[LaneKey, int]] = []  # steps whose time is not known yet
        self._incoming: list[Request] = []  # written by other threads, under _wake
        self._wake = threading.Condition()
        self._stopping = False
        self._lost = False  # the thread has ended by an error that is no job's
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.num_steps = 0  # forwards run
        self.num_shared_steps = 0  # of these, how many advanced two jobs or more
        self.num_rows = 0  # rows of all forwards

    def start(self) -> None:
        """Start the thread. After :meth:`warm_up`."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish the current step and the decoding; cancel the rest, with checkpoints, for the reason ``shutdown``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, work: Work) -> Request:
        """Run this work from the next step on."""
        request = Request(work)
        with self._wake:
            if self._stopping:
                request.future.set_exception(Cancelled("lost" if self._lost else "shutdown"))
                return request
            if self.idle:
                self.progress_at = time.monotonic()  # waiting for work is no stall
            self._incoming.append(request)
            self._wake.notify()
        return request

    @property
    def idle(self) -> bool:
        """Every request has been finished."""
        return not (self._unfinished or self._incoming)

    def stalled_for(self) -> float:
        """Seconds since the last progress while there is work; infinite when the engine has failed."""
        if self._lost:
            return float("inf")
        return 0.0 if self.idle else time.monotonic() - self.progress_at

    def warm_up(self) -> None:
        """Measure memory and step costs at the model's own size, and run every part once. Before :meth:`start`.

        Raises:
            OutOfMemory: the model's own size does not fit.
            ConfigurationError: the fixed rows of the reproducible mode do not fit.
        """
        key = measure(self.family, self._conditioner, self.network, self._decoder, self.memory)
        self._publisher.prepare_previews(key.latent_shape[0])
        fixed_rows = self.network.fixed_rows
        if fixed_rows is None:
            calibrate(self, key)
        elif (rows := self.memory.num_rows(key, fixed_rows)) < fixed_rows:
            raise ConfigurationError(f"reproducible_rows: got {fixed_rows}; memory allows {rows}")

    def step(self) -> None:
        """Admit, plan, run, settle: one denoise step of one batch, and at most one micro-batch of text and one of images."""
        self._admit()
        batch = self.planner.select(self._active)
        failures = self._run(batch)
        self._settle(batch, failures)
        self._decoder.decode_some()
        if self._active or self._arriving or self._incoming or self._decoder.pending:
            self._publisher.publish_done()
        else:
            self._publisher.publish_all()  # nothing to launch: only this thread may wait for the device
        self.progress_at = time.monotonic()

    def _loop(self) -> None:
        try:
            self._run_until_stopped()
        except BaseException:
            # No job's failure: those are settled in step(). The process can no longer be trusted and has to end; leases
            # run out as after a crash, and a job that causes this repeatedly is then run alone.
            log.critical("the engine has failed: its jobs are left to other workers", exc_info=True)
            with self._wake:
                self._lost = self._stopping = True
                unfinished = [*self._unfinished, *self._incoming]
            for request in unfinished:
                request.future.set_exception(Cancelled("lost"))

    def _run_until_stopped(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: not self.idle or self._stopping)
                if self._stopping:
                    break
            self.step()
        incoming = self._take_incoming()
        for request in self._active:
            self._publisher.checkpoint(request, self.lanes[request.lane])
        self._publisher.publish_all()
        for request in [*self._active, *self._arriving, *incoming]:
            self._finish(request, Cancelled("shutdown"))
        self.progress_at = time.monotonic()
        while self._decoder.pending:  # these are denoised already: that work would be lost
            self._decoder.decode_some()
            self._publisher.publish_done()
            self.progress_at = time.monotonic()
        self._publisher.publish_all()

    def _take_incoming(self) -> list[Request]:
        """The requests that other threads have submitted; from now on this thread answers for them."""
        with self._wake:
            incoming, self._incoming = self._incoming, []
            self._unfinished.update(incoming)
        return incoming

    def _admit(self) -> None:
        """Drop cancelled requests; encode one micro-batch of text; move requests whose text is encoded into their lanes."""
        self._arriving = sorted([*self._arriving, *self._take_incoming()], key=lambda r: (r.priority, r.arrival))
        for request in [*self._active, *self._arriving]:
            if request.cancel_reason:
                self._finish(request, Cancelled(request.cancel_reason))
        failures = self._conditioner.encode_some(text for request in self._arriving for text in request.work.texts)
        full: set[LaneKey] = set()  # lanes in which a request waits for slots: later ones must not overtake it
        for request in list(self._arriving):
            try:
                for text in request.work.texts:
                    if text in failures:
                        raise failures[text]
                self._join(request, full)
            except Exception as error:
                raise_if_lost(error)
                self._finish(request, error)

    def _join(self, request: Request, full: set[LaneKey]) -> None:
        """Move the request into its lane if its texts are encoded and there is a slot for each image; else it waits."""
        conditionings = [self._conditioner.get(text) for text in request.work.texts]
        cond, uncond = conditionings[0], conditionings[-1]
        if cond is None or uncond is None:
            return
        request.prompt_tokens, request.text_tokens = cond.tokens, len(cond.prompt_embeds)
        key, width = request.lane, cond.prompt_embeds.shape[-1]
        if key not in self.lanes:
            self.lanes.open(key, width, self.network.fixed_rows or 1)
            self.planner.cost.cap(key, self.memory.num_rows(key, self.planner.cost.max_rows))
        lane = self.lanes.use(key)
        if key in full:
            return
        if not self.lanes.has_slots(key, request.num_images, width):
            full.add(key)
            return
        lane.join(request, cond.prompt_embeds, uncond.prompt_embeds if request.work.guided else None)
        self._arriving.remove(request)
        self._active.append(request)
        request.reached("joined")
        request.phase = Phase.DENOISING
        if request.remaining == 0:  # resumed after its last step: only decoding or delivery is missing
            self._denoised(request)

    def _run(self, batch: Sequence[Request]) -> dict[Request, Exception]:
        """One forward for the batch; if it fails, in halves, so that only the requests at fault fail."""
        failures: dict[Request, Exception] = {}
        run_in_parts(batch, self._forward, failures.__setitem__, device=self.family.device)
        # Not in _forward: an error after a step's commit must not run the step again.
        while (seconds := self.clock.take()) is not None:
            self.planner.cost.observe(*self._launched.pop(0), seconds)
        return failures

    def _forward(self, batch: Sequence[Request]) -> None:
        key, rows = batch[0].lane, sum(r.rows for r in batch)
        limit = self.planner.cost.limit(key)
        try:
            fitted = self.lanes[key].step(batch, limit)
        except Exception:
            self.clock.drop()
            raise
        # The step is committed: from here on nothing may fail.
        if fitted < min(rows, limit) and self.network.fixed_rows is None:  # less memory than was measured
            self.planner.cost.lower(key, fitted)
        self._launched.append((key, rows))
        self.num_rows += rows

    def _settle(self, batch: Sequence[Request], failures: dict[Request, Exception]) -> None:
        """Count the step, pass on what is denoised, fail what failed."""
        self.num_steps += bool(batch)
        self.num_shared_steps += len(batch) > 1
        for request in batch:
            if error := failures.get(request):
                self._finish(request, error)
                continue
            try:
                self._stepped(request, len(batch))
            except Exception as error:  # such as no memory for a copy: this job's own failure
                raise_if_lost(error)
                self._finish(request, error)

    def _stepped(self, request: Request, batch_jobs: int) -> None:
        """The request has advanced by one step: pass it on if it was the last, else take what is due."""
        request.step += 1
        request.batch_jobs = batch_jobs
        request.shared_steps += batch_jobs > 1
        if request.remaining == 0:
            self._denoised(request)
            return
        schedule, every = self.checkpoint_schedule, request.work.preview_every
        if schedule and schedule.due(request.checkpoint_at, len(self._active)):
            self._publisher.checkpoint(request, self.lanes[request.lane])
        if every and request.step % every == 0:
            self._publisher.preview(request, self.lanes[request.lane])

    def _denoised(self, request: Request) -> None:
        """All steps are done: free the slots; decode in one of the next steps."""
        lane = self.lanes[request.lane]
        latents = lane.latents(request)
        if self.checkpoint_schedule:  # so that a delivery that fails later does not repeat the denoising
            self._publisher.checkpoint(request, lane)
        finite = torch.isfinite(latents).all()
        request.reached("denoised")
        self._leave(request)
        if not request.work.decode:
            self._publisher.result(latents, finite, lambda outcome: self._finish(request, outcome))
            return
        request.phase = Phase.DECODING
        self._decoder.submit(latents, lambda outcome: self._decoded(request, outcome, finite))

    def _decoded(self, request: Request, outcome: torch.Tensor | Exception, finite: torch.Tensor) -> None:
        request.reached("decoded")
        if request.cancel_reason:
            self._finish(request, Cancelled(request.cancel_reason))
        elif isinstance(outcome, Exception):
            self._finish(request, outcome)
        else:
            self._publisher.result(outcome, finite, lambda outcome: self._finish(request, outcome))

    def _finish(self, request: Request, outcome: torch.Tensor | Exception) -> None:
        self._leave(request)
        if isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)
        self._unfinished.discard(request)

    def _leave(self, request: Request) -> None:
        for requests in (self._active, self._arriving):
            if request in requests:
                requests.remove(request)
        if request.slots:
            self.lanes[request.lane].leave(request)
