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
from latentline_worker.samplers import sampler_table

from .batch import Lane
from .checkpoint import Pace
from .clock import StepClock
from .conditioning import MICRO_BATCH, Conditioner
from .cost import CostModel
from .decoder import Decoder
from .memory import Memory
from .network import Network, device_lost, out_of_memory
from .planner import Planner
from .preview import LatentToRgb
from .request import Cancelled, LaneKey, Preview, Request, Work

log = logging.getLogger(__name__)


CALIBRATED_ROWS = 16  # up to here every doubling is measured before the first job: one disturbed time must not end the search
MAX_LANES = 8  # kept ready while empty; each holds slots, and on a GPU captured graphs


class Engine:
    """Runs many jobs together. ``submit`` from any thread; each job's future gives its pixels.

    Text encoding and VAE decoding run on the same thread between denoise steps, one micro-batch at a time: a step
    waits for at most one of each, and no two threads compete for the device's cores or streams.

    Args:
        family: the loaded model.
        max_rows: network rows of one forward (a guided image costs two); memory and the measured costs may allow fewer.
        decode_batch: images of one VAE call.
        fixed_rows: the reproducible mode: run the network at exactly this many padded rows, and encode and decode one
            by one, so that a job's picture is bit-identical whatever it ran together with.
        memory_limit_bytes: what may be used beside the weights; by default most of what is free.
        graphs: capture CUDA graphs (no effect on a CPU).
        checkpoint_s: seconds between a job's checkpoints (``request.checkpoint``); None takes none but at :meth:`stop`.
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
        self.pace = Pace(checkpoint_s) if checkpoint_s is not None else None
        self.progress_at = time.monotonic()  # when the engine last finished anything
        self.family = family
        self.planner = Planner(CostModel(fixed_rows or max_rows))
        self.clock = StepClock(family.device)
        self.memory = Memory(family, memory_limit_bytes)
        self._fixed_rows = fixed_rows
        self.network = Network(family, fixed_rows, graphs)
        self._conditioner = Conditioner(family, 1 if fixed_rows else MICRO_BATCH)
        self._decoder = Decoder(family, 1 if fixed_rows else decode_batch)
        self._rgb: LatentToRgb | None = None
        self.lanes: dict[LaneKey, Lane] = {}
        self._arriving: list[Request] = []  # text not encoded yet, or no slot free
        self._active: list[Request] = []
        self._launched: list[tuple[LaneKey, int]] = []  # steps whose time is not known yet
        self._incoming: list[Request] = []  # written by other threads, under _wake
        self._wake = threading.Condition()
        self._stopping = False
        self._stepping = False
        self._lost = False  # the thread has ended by an error that no job explains
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.num_steps = 0  # forwards run
        self.num_shared_steps = 0  # of these, how many advanced two jobs or more
        self.num_rows = 0  # rows of all forwards

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish the step that runs and the decoding; cancel what is left, checkpointed, with reason ``shutdown``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, work: Work) -> Request:
        """Take part from the next step on."""
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
        """Nothing to encode, denoise or decode."""
        return not (self._active or self._arriving or self._incoming or self._decoder.pending)

    def step(self) -> None:
        """Admit, plan, run, settle: one denoise step of one batch, between at most one micro-batch of text and one of images."""
        self._stepping = True  # also while the last image is decoded, when nothing else is left
        self._admit()
        batch = self.planner.select(self._active)
        failures = self._run(batch)
        self._settle(batch, failures)
        self._decoder.decode_some()
        self.progress_at = time.monotonic()
        self._stepping = False

    def stalled_for(self) -> float:
        """Seconds since anything was finished, while there is work; infinite when the engine has failed."""
        if self._lost:
            return float("inf")
        return 0.0 if self.idle and not self._stepping else time.monotonic() - self.progress_at

    def warm_up(self) -> None:
        """Measure memory and step costs at the model's own size, and run every part once. Before :meth:`start`."""
        info = self.family.info
        self._conditioner.encode_some([""])
        conditioning = self._conditioner.get("")
        assert conditioning is not None
        states = conditioning.states
        shape = self.family.latent_shape(info.default_width, info.default_height)
        key = LaneKey(info.id, shape, len(states))

        with torch.inference_mode():
            x, t = torch.zeros(1, *shape, device=self.family.device), torch.full((1,), 500.0, device=self.family.device)
            self.network(x, t, states[None])  # allocators and kernels come to life
            # The bare forward: the network's own may pad.
            self.memory.measure(key, lambda: self.family.denoise(x, t, states[None]), lambda: self._decoder.decode_now(x))
            self.memory.check(key, states.shape[-1])
            self.network.trace(torch.randn(2, *shape, device=self.family.device), t.expand(2), states.expand(2, -1, -1))
            self._rgb = LatentToRgb.fit(self.family, shape[0])
        if self._fixed_rows is None:
            self._calibrate(key)
        elif self.memory.num_rows(key, self._fixed_rows) < self._fixed_rows:
            raise ConfigurationError(
                f"reproducible_rows: got {self._fixed_rows}; memory allows {self.memory.num_rows(key, self._fixed_rows)}"
            )

    def _calibrate(self, key: LaneKey) -> None:
        """Find the lane's row budget with a few real steps of an ever larger batch, before the first client waits for one."""
        info = self.family.info
        table = sampler_table("ddim", self.family.scheduler_config, 50)
        # Unguided images: one row each, so that every row count can be tried.
        crowd: list[Request] = []
        cost, rows, budget = self.planner.cost, 1, 0
        while cost.budget(key) > budget or rows <= CALIBRATED_ROWS:
            cost.explore(key, min(rows, CALIBRATED_ROWS))
            budget, rows = cost.budget(key), 2 * rows
            while len(crowd) < budget:
                crowd.append(self.submit(Work("warm-up", info.id, "", "", key.latent_shape, table, 1.0, (0,), decode=False)))
            for _ in range(4):
                self.step()
        cost.explore(key, 1)
        for request in crowd:
            request.cancel("warm-up")
        self.step()
        log.info("%d rows a step are enough for latents of %s", self.planner.cost.budget(key), "x".join(map(str, key.latent_shape)))

    def _loop(self) -> None:
        try:
            self._run_until_stopped()
        except BaseException:
            # Not a job's failure: those are settled in step(). What is in the process now nobody knows, so it has to
            # end; leases run out as after a crash, and a job that does this again ends up running alone.
            log.critical("the engine has failed: its jobs are left to other workers", exc_info=True)
            with self._wake:
                self._lost = self._stopping = True
            self._decoder.abandon(Cancelled("lost"))
            for request in [*self._active, *self._arriving, *self._incoming]:
                if not request.future.done():
                    request.future.set_exception(Cancelled("lost"))

    def _run_until_stopped(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: not self.idle or self._stopping)
                if self._stopping:
                    break
            self.step()
        for request in self._active:
            request.checkpoint = self.lanes[request.lane].snapshot(request)
        for request in [*self._active, *self._arriving, *self._incoming]:
            self._finish(request, Cancelled("shutdown"))
        while self._decoder.pending:  # their denoising is paid for
            self._decoder.decode_some()

    def _admit(self) -> None:
        """Drop the cancelled; encode one micro-batch of text; let those whose text is known join their lanes."""
        with self._wake:
            incoming, self._incoming = self._incoming, []
        self._arriving = sorted([*self._arriving, *incoming], key=lambda r: (r.priority, r.arrival))
        for request in [r for r in [*self._active, *self._arriving] if r.cancel_reason]:
            self._finish(request, Cancelled(request.cancel_reason or ""))
        if not self._arriving:
            return
        failures = self._encode(self._arriving)
        full: set[LaneKey] = set()  # nobody overtakes a request that waits for slots of its lane
        for request in list(self._arriving):
            try:
                if failure := failures.get(request):
                    raise failure
                self._join(request, full)
            except Exception as error:  # this job's own failure: the batch goes on
                self._finish(request, error)

    def _encode(self, requests: Sequence[Request]) -> dict[Request, Exception]:
        """One micro-batch of the requests' texts; where it fails, one by one, and whose texts those were."""
        try:
            self._conditioner.encode_some(text for request in requests for text in _texts(request.work))
            return {}
        except Exception as error:
            log.warning("encoding failed (%s): one by one", type(error).__name__)
        failures: dict[Request, Exception] = {}
        unknown = [r for r in requests if any(self._conditioner.get(text) is None for text in _texts(r.work))]
        for request in unknown[:MICRO_BATCH]:
            try:
                for text in _texts(request.work):
                    self._conditioner.encode_some([text])
            except Exception as error:
                failures[request] = error
        return failures

    def _join(self, request: Request, full: set[LaneKey]) -> None:
        """Into its lane, if its texts are encoded and there is a slot for each image; else it stays for the next step."""
        known = [self._conditioner.get(text) for text in _texts(request.work)]
        conditionings = [one for one in known if one]
        if len(conditionings) < len(known):
            return
        cond, uncond = conditionings[0], conditionings[1] if request.work.guided else None
        request.prompt_tokens, request.text_tokens = cond.tokens, len(cond.states)
        width = cond.states.shape[-1]
        key = request.lane
        if key not in self.lanes:
            self.memory.check(key, width, self._fixed_rows or 1)
            self._make_room()
            self.lanes[key] = Lane(self.family, key, self.network, self.clock)
            self.planner.cost.cap(key, self.memory.num_rows(key, self.planner.cost.max_rows))
        lane = self.lanes[key] = self.lanes.pop(key)  # the newest use comes last
        if key in full:
            return
        if lane.num_used and lane.num_used + request.num_images > self.memory.num_slots(key, width):
            full.add(key)
            return
        self._arriving.remove(request)
        lane.join(request, cond.states, uncond.states if uncond else None)
        request.reached("joined")
        request.phase = Phase.DENOISING
        self._active.append(request)
        if request.remaining == 0:  # only its decoding or delivery is missing
            self._denoised(request)

    def _make_room(self) -> None:
        """Drop the lanes that have been empty for longest, with what was captured for them, so that sizes do not pile up."""
        empty = [key for key, lane in self.lanes.items() if not lane.num_used]
        for key in empty[: max(0, len(self.lanes) - MAX_LANES + 1)]:
            del self.lanes[key]
            self.network.forget(key.latent_shape)
            self.network.release_memory()

    def _run(self, batch: Sequence[Request]) -> dict[Request, Exception]:
        """One forward for the batch; if it fails, one for each half, so that only the guilty fail."""
        if not batch:
            return {}
        try:
            self._forward(batch)
            return {}
        except Exception as error:
            self.clock.drop()
            if device_lost(error):  # nothing works on it any more, whoever's fault it was: the engine has failed
                raise
            if len(batch) == 1:
                return {batch[0]: error.with_traceback(None) if out_of_memory(error) else error}  # frames hold tensors
            log.warning("a step of %d jobs failed (%s): trying it in halves", len(batch), type(error).__name__)
        self.network.release_memory()
        half = len(batch) // 2
        return {**self._run(batch[:half]), **self._run(batch[half:])}

    def _forward(self, batch: Sequence[Request]) -> None:
        key, rows = batch[0].lane, sum(r.rows for r in batch)
        limit = self.planner.cost.limit(key)
        fitted = self.lanes[key].step(batch, limit)
        if fitted < min(rows, limit) and self._fixed_rows is None:  # memory did not suffice for as many as were thought
            self.planner.cost.lower(key, fitted)
        self._launched.append((key, rows))
        while (seconds := self.clock.take()) is not None:
            self.planner.cost.observe(*self._launched.pop(0), seconds)
        self.num_rows += rows

    def _settle(self, batch: Sequence[Request], failures: dict[Request, Exception]) -> None:
        """Count the step, hand on what is denoised, fail what failed."""
        self.num_steps += bool(batch)
        self.num_shared_steps += len(batch) > 1
        for request in batch:
            if error := failures.get(request):
                self._finish(request, error)
                continue
            try:
                self._advance(request, len(batch))
            except Exception as error:  # such as no memory for a copy: this job's own failure
                self._finish(request, error)

    def _advance(self, request: Request, batch_jobs: int) -> None:
        """One step of this job is done: hand it on, or keep what others may need of it."""
        request.step += 1
        request.batch_jobs = batch_jobs
        request.shared_steps += batch_jobs > 1
        every = request.work.preview_every
        if request.remaining == 0:
            self._denoised(request)
            return
        if self.pace and self.pace.due(request.checkpoint_at, len(self._active)):
            self._checkpoint(request, self.pace)
        if every and request.step % every == 0:
            self._preview(request)

    def _checkpoint(self, request: Request, pace: Pace) -> None:
        started = time.monotonic()
        request.checkpoint, request.checkpoint_at = self.lanes[request.lane].snapshot(request), started
        pace.taken(time.monotonic() - started)

    def _preview(self, request: Request) -> None:
        try:
            if self._rgb is None:
                self._rgb = LatentToRgb.fit(self.family, request.work.latent_shape[0])
            with torch.inference_mode():
                request.preview = Preview(request.step, self._rgb(self.lanes[request.lane].denoised(request)))
        except Exception as error:  # nothing that a job should be lost for
            log.warning("job %s: no preview (%s)", request.work.job_id, type(error).__name__)

    def _denoised(self, request: Request) -> None:
        """Free the slots; decode in one of the next steps."""
        latents = self.lanes[request.lane].latents(request)
        if self.pace:  # a delivery that fails later does not cost the denoising again
            self._checkpoint(request, self.pace)
        request.finite = torch.isfinite(latents).all()
        request.reached("denoised")
        self._leave(request)
        if not request.work.decode:
            request.future.set_result(latents)
            return
        request.phase = Phase.DECODING
        self._decoder.submit(latents, lambda outcome: self._decoded(request, outcome))

    def _decoded(self, request: Request, outcome: torch.Tensor | Exception) -> None:
        request.reached("decoded")
        if request.cancel_reason:
            outcome = Cancelled(request.cancel_reason)
        self._finish(request, outcome)

    def _finish(self, request: Request, outcome: torch.Tensor | Exception) -> None:
        self._leave(request)
        if isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)

    def _leave(self, request: Request) -> None:
        for room in (self._active, self._arriving):
            if request in room:
                room.remove(request)
        if request.slots:
            self.lanes[request.lane].leave(request)


def _texts(work: Work) -> list[str]:
    return [work.prompt, work.negative_prompt] if work.guided else [work.prompt]
