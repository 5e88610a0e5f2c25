"""The thread that owns the device: text in, pixels out, one denoise step at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from latentline.errors import ModelError
from latentline.jobs import Phase
from latentline_worker.models.base import Family

from .admission import Admission
from .checkpoint import CheckpointSchedule
from .clock import StepClock
from .conditioning import MICRO_BATCH, Conditioner
from .cost import CostModel
from .decoder import Decoder
from .delivery import Delivery
from .failures import raise_if_lost, run_in_parts
from .graphs import Graphs
from .intake import Intake
from .lanes import Lanes
from .memory import Memory
from .network import Network
from .planner import Planner
from .publisher import Publisher
from .request import Cancelled, LaneKey, Request, Step, Work
from .warm_up import warm_up

log = logging.getLogger(__name__)


class Engine:
    """Runs many jobs together. ``submit`` from any thread; each job's future gives its pixels.

    Text encoding and VAE decoding run on the same thread between denoise steps, one micro-batch at a time: a step
    waits for at most one of each, and no two threads compete for the device's cores or streams. Other threads are given
    host memory only (see :class:`~.host_copies.HostCopies`), so none of them ever waits for the device.

    Errors are charged to the job that caused them. A lost device is no job's error: it ends the thread (:meth:`stalled_for`
    is then infinite), and the jobs are resumed by other workers.

    Args:
        families: the loaded models, all on one device; at least one. :mod:`.residents` exchanges them.
        max_rows: network rows of one forward (a guided image needs two); memory and the measured costs may allow fewer.
        decode_batch: images of one VAE call.
        fixed_rows: the reproducible mode: run the network at exactly this many padded rows, and encode and decode one
            by one, so that a job's picture is bit-identical whatever ran beside it.
        memory_limit_bytes: what may be used beside the weights; by default most of what is free.
        record: capture CUDA graphs, and on a CPU record forwards. What is recorded of a model keeps its weights for as long as the process
            lives, so an engine whose models are exchanged records nothing.
        checkpoint_s: seconds between a job's checkpoints (``request.checkpoint``); None takes none except at :meth:`stop`.
    """

    def __init__(
        self,
        families: Sequence[Family],
        max_rows: int = 64,
        decode_batch: int = 4,
        fixed_rows: int | None = None,
        memory_limit_bytes: int | None = None,
        record: bool = True,
        checkpoint_s: float | None = None,
    ) -> None:
        self.checkpoint_schedule = CheckpointSchedule(checkpoint_s) if checkpoint_s is not None else None
        self.families = {family.info.id: family for family in families}
        self.fixed_rows = fixed_rows
        self.device = families[0].device
        self.planner = Planner(CostModel(fixed_rows or max_rows))
        self.clock = StepClock(self.device)
        micro_batch = 1 if fixed_rows else MICRO_BATCH
        self.memory = Memory(self.device, memory_limit_bytes, self._adapter_bytes, micro_batch)
        pool = torch.cuda.graph_pool_handle() if record and self.device.type == "cuda" else None
        self.networks = {
            model: Network(family, fixed_rows, Graphs(pool) if pool else None, record=record) for model, family in self.families.items()
        }
        self.decoder = Decoder(1 if fixed_rows else decode_batch, not fixed_rows, lambda model, size: self.lanes.num_decodes(model, size))
        self.lanes = Lanes(
            self.families, self.networks, self.memory, self.clock, self.decoder, fixed_rows or max_rows,
            opened=lambda key, rows: self.planner.cost.cap(key, rows),
        )  # fmt: skip
        self.conditioner = Conditioner(micro_batch, self.memory.text_bytes)
        self.publisher = Publisher(self.families, self.checkpoint_schedule)
        self._admission = Admission(self.families, self.conditioner, self.lanes, self.publisher, self.memory.text_bytes)
        self._delivery = Delivery(self.families, self.decoder, self.publisher, self._leave, self._finish)
        self._active: list[Request] = []  # in a lane
        self._launched: list[tuple[LaneKey, Step]] = []  # steps whose time is not known yet
        self.intake = Intake()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        # Forwards run, how many of them advanced two jobs or more, and the rows of all.
        self.num_steps = self.num_shared_steps = self.num_rows = 0
        self.num_texts = 0  # of the requests that joined a lane; Conditioner.num_encoded of them were not cached

    def start(self) -> None:
        """Start the thread. After :meth:`warm_up`."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish the current step and the decoding; cancel the rest, with checkpoints, for the reason ``shutdown``."""
        self.intake.close("shutdown")
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, work: Work) -> Request:
        """Run this work from the next step on."""
        request = Request(work)
        if work.model not in self.families:
            request.future.set_exception(ModelError(f"{work.model}: not loaded; loaded: {', '.join(self.families)}"))
            return request
        return self.intake.submit(request)

    def call(self, action: Callable[[], object]) -> Future[Any]:
        """Let the thread that owns the device do something between two steps, such as exchange models. From any thread."""
        return self.intake.call(action)

    @property
    def num_encoded(self) -> int:
        """Texts that were encoded so far."""
        return self.conditioner.num_encoded

    @property
    def used_bytes(self) -> int:
        """What slots, cached texts and adapters take of :attr:`Memory.usable` now."""
        return self.lanes.slot_bytes + self.conditioner.num_bytes + self._adapter_bytes()

    @property
    def idle(self) -> bool:
        return self.intake.idle

    def stalled_for(self) -> float:
        """Seconds since the last progress while there is work; infinite when the engine has failed."""
        if self.intake.lost:
            return float("inf")
        return 0.0 if self.idle else time.monotonic() - self.intake.progress_at

    def warm_up(self) -> None:
        """Measure memory and step costs at each model's own size, and run every part once. Before :meth:`start`.

        Raises:
            OutOfMemory: a model's own size does not fit.
            ConfigurationError: the fixed rows of the reproducible mode do not fit.
        """
        for family in self.families.values():
            warm_up(self, family)

    def step(self) -> None:
        """Admit, plan, run, settle: one denoise step of one batch, and at most one micro-batch of text and one of images."""
        self.intake.do_calls()
        self._admit()
        batch = self.planner.select(self._active)
        failures = self._run(batch)
        self._settle(batch, failures)
        self.decoder.decode_some()
        if self._active or self._admission.waiting or self.intake.pending or self.decoder.pending:
            self.publisher.publish_done()
        else:
            self.publisher.publish_all()  # nothing to launch: only this thread may wait for the device
        self.intake.progress_at = time.monotonic()

    def _loop(self) -> None:
        try:
            self._run_until_stopped()
        except BaseException:
            # No job's failure: those are settled in step(). The process has to end; leases run out as after a crash, and a
            # job that causes this repeatedly is then run alone.
            log.critical("the engine has failed: its jobs are left to other workers", exc_info=True)
            self.intake.fail()

    def _run_until_stopped(self) -> None:
        while self.intake.wait():
            self.step()
        incoming = self.intake.take()
        for request in self._active:
            self.publisher.checkpoint(request, self.lanes[request.lane])
        self.publisher.publish_all()
        for request in [*self._active, *self._admission.waiting, *incoming]:
            self._finish(request, Cancelled("shutdown"))
        self.intake.progress_at = time.monotonic()
        while self.decoder.pending:  # these are denoised already: that work would be lost
            self.decoder.decode_some()
            self.publisher.publish_done()
            self.intake.progress_at = time.monotonic()
        self.publisher.publish_all()

    def _admit(self) -> None:
        """Drop requests that are cancelled or broken, encode one micro-batch of text, and let requests join their lanes."""
        self._admission.add(self.intake.take())
        for request in [*self._active, *self._admission.waiting]:
            if request.cancel_reason:
                self._finish(request, Cancelled(request.cancel_reason))
            elif request.broken:
                self._finish(request, request.broken)
        self._admission.admit(self._joined, self._finish)

    def _adapter_bytes(self) -> int:
        """What the banks of all models take."""
        return sum(family.adapters.bank.num_bytes for family in self.families.values() if family.adapters)

    def _joined(self, request: Request) -> None:
        """The request is in its lane."""
        self._active.append(request)
        self.num_texts += len(request.work.texts)
        request.reached("joined")
        request.phase = Phase.DENOISING
        if request.remaining == 0:  # resumed after its last step: only decoding or delivery is missing
            self._delivery.denoised(request, self.lanes[request.lane])

    def _run(self, batch: Sequence[Request]) -> dict[Request, Exception]:
        """One forward for the batch; if it fails, in halves, so that only the requests at fault fail."""
        failures: dict[Request, Exception] = {}
        run_in_parts(batch, self._forward, failures.__setitem__, device=self.device)
        # Not in _forward: an error after a step's commit must not run the step again.
        while (seconds := self.clock.take()) is not None:
            key, step = self._launched.pop(0)
            step.seconds = seconds
            self.planner.cost.observe(key, step.rows, seconds)
        return failures

    def _forward(self, batch: Sequence[Request]) -> None:
        key, rows = batch[0].lane, sum(r.rows for r in batch)
        step = Step(time.monotonic(), tuple(r.work.job_id for r in batch), rows)
        limit = self.planner.cost.limit(key)
        try:
            fitted = self.lanes[key].step(batch, limit)
        except Exception:
            self.clock.drop()
            raise
        # The step is committed: from here on nothing may fail.
        if fitted < min(rows, limit) and self.fixed_rows is None:  # less memory than was measured
            self.planner.cost.lower(key, fitted)
        self._launched.append((key, step))
        for request in batch:
            request.steps.append(step)
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
            self._delivery.denoised(request, self.lanes[request.lane])
            return
        schedule, every = self.checkpoint_schedule, request.work.request.preview_every
        if schedule and schedule.due(request.checkpoint_at, len(self._active)):
            self.publisher.checkpoint(request, self.lanes[request.lane])
        if every and request.step % every == 0:
            self.publisher.preview(request, self.lanes[request.lane])

    def _finish(self, request: Request, outcome: torch.Tensor | Exception) -> None:
        self._leave(request)
        if isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)
        self.intake.finished(request)

    def _leave(self, request: Request) -> None:
        self._admission.remove(request)
        self._admission.release_adapters(request)
        if request in self._active:
            self._active.remove(request)
        if request.slots:
            self.lanes[request.lane].leave(request)
