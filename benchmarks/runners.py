"""The ways of running a trace: plain pipelines one by one, static batches, the engine, and the bare network as lower bound.

Each runs the real computation and measures it. Latencies are counted on a clock that advances by the measured computing
time and jumps to the next arrival when there is nothing to do, so no run sleeps and every arrival is on time.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from latentline.jobs import ResolvedRequest
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.network import Network
from latentline_worker.engine.request import Request, Work
from latentline_worker.models.base import Family, Row
from latentline_worker.samplers import make_scheduler

from .trace import MAX_STATIC_BATCH, Job


@dataclass
class Run:
    """Figures of one run of a trace."""

    latency_s: dict[Job, float] = field(default_factory=dict)
    busy_s: float = 0.0  # computing
    makespan_s: float = 0.0  # from the first arrival's clock to the last end
    batch_rows: Counter[int] = field(default_factory=Counter)  # network calls by their number of rows
    step_s: float = 0.0  # steps of 8 rows or more that no job joined
    forward_s: float = 0.0  # the network's part of step_s
    mean_batch_jobs: float = 1.0

    def throughput(self) -> float:
        """Jobs per second of makespan."""
        return len(self.latency_s) / self.makespan_s

    def mean_s(self, short: bool = False) -> float:
        return statistics.mean(self._of(short))

    def quantile_s(self, q: float, short: bool = False) -> float:
        values = sorted(self._of(short))
        return values[min(len(values) - 1, int(q * len(values)))]

    def _of(self, short: bool) -> list[float]:
        return [s for job, s in self.latency_s.items() if job.short or not short] or [float("nan")]


def pipelines(trace: Sequence[Job], pipeline: Any, side_px: int, batched: bool) -> Run:
    """Plain diffusers. With ``batched``, waiting jobs with the first one's step count, sampler and guidance share a call.

    A pipeline's batch cannot mix more than that: its scheduler and guidance belong to the call, not to the image. This
    favours static batching over celery-batches, because it never waits for a batch to fill.
    """
    run = Run()
    todo, waiting, now, calls = deque(sorted(trace, key=lambda job: job.arrival_s)), deque[Job](), 0.0, 0
    config = dict(pipeline.scheduler.config)
    while todo or waiting:
        if not waiting:
            now = max(now, todo[0].arrival_s)
        while todo and todo[0].arrival_s <= now:
            waiting.append(todo.popleft())
        head = waiting[0]
        alike = [j for j in waiting if (j.steps, j.scheduler, j.guidance_scale) == (head.steps, head.scheduler, head.guidance_scale)]
        batch = alike[:MAX_STATIC_BATCH] if batched else [head]
        started = time.perf_counter()
        pipeline.scheduler = make_scheduler(head.scheduler, config)
        pipeline(
            [job.prompt for job in batch],
            num_inference_steps=head.steps,
            guidance_scale=head.guidance_scale,
            width=side_px,
            height=side_px,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            output_type="latent",
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        now, run.busy_s, calls = now + elapsed, run.busy_s + elapsed, calls + 1
        run.batch_rows[sum(job.rows for job in batch)] += head.steps
        for job in batch:
            waiting.remove(job)
            run.latency_s[job] = now - job.arrival_s
    run.makespan_s, run.mean_batch_jobs = now, len(trace) / calls
    return run


def record(pipeline: Any, network: Network) -> None:
    """Let a pipeline call the forward that the engine calls, so that what is left between the two is batching."""

    def forward(sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        with torch.inference_mode():
            out, _most = network(sample, timestep.expand(len(sample)).float(), {"prompt_embeds": encoder_hidden_states})
        return (out,)

    pipeline.unet.forward = forward


def engine(trace: Sequence[Job], engine: Engine, side_px: int) -> Run:
    """The engine itself, stepped here instead of by its thread."""
    run = Run()
    (family,) = engine.families.values()
    todo, now = deque(sorted(trace, key=lambda job: job.arrival_s)), 0.0
    running: dict[Request, Job] = {}
    shared = batches = 0
    while todo or running:
        if not running:
            now = max(now, todo[0].arrival_s)
        started = time.perf_counter()
        joined = False
        while todo and todo[0].arrival_s <= now:
            running[engine.submit(to_work(family, todo[0], side_px))] = todo[0]
            todo.popleft()
            joined = True
        rows, step_s, forward_s = engine.num_rows, engine.clock.step_s, engine.clock.forward_s
        engine.step()
        ended = [request for request in running if request.future.done()]
        if torch.cuda.is_available() and ended:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        rows = engine.num_rows - rows
        run.batch_rows[rows] += 1
        batches, shared = batches + 1, shared + sum(request.phase == "denoising" for request in running)
        if rows >= 8 and not joined:
            # On a GPU the device's own clock; on a CPU the host's work is part of the step.
            run.step_s += engine.clock.step_s - step_s if torch.cuda.is_available() else elapsed
            run.forward_s += engine.clock.forward_s - forward_s
        now, run.busy_s = now + elapsed, run.busy_s + elapsed
        for request in ended:
            job = running.pop(request)
            request.result()
            run.latency_s[job] = now - job.arrival_s
    run.makespan_s, run.mean_batch_jobs = now, shared / max(1, batches)
    return run


def bare_network(engine: Engine, batch_rows: Counter[int], side_px: int, repeats: int = 5) -> float:
    """Seconds that the network alone takes for these calls: a lower bound of the engine's time."""
    (family,) = engine.families.values()
    network = engine.networks[family.info.id]
    work = to_work(family, Job("", family.info.first_scheduler, 20, 1.0, 0), side_px)
    total = 0.0
    with torch.inference_mode():
        (row,) = family.rows(work.request, family.encode(work.texts))
        for num_rows, count in sorted(batch_rows.items()):
            if num_rows:
                x, t, rows = network_inputs(family, work, row, num_rows)
                total += count * _seconds(lambda x=x, t=t, rows=rows: network(x, t, rows), repeats)
    return total


def network_inputs(family: Family, work: Work, row: Row, count: int) -> tuple[torch.Tensor, torch.Tensor, Row]:
    """Random latents of this size with one row's conditions, ``count`` times."""
    x, t = torch.randn(count, *work.latent_shape, device=family.device), torch.full((count,), 500.0, device=family.device)
    return x, t, {name: tensor.expand(count, *tensor.shape) for name, tensor in row.items()}


def to_work(family: Family, job: Job, side_px: int) -> Work:
    """A trace's job as the engine's work. Its result is the latents, as that of the pipelines is."""
    request = ResolvedRequest(
        version=1,
        model=family.info.id,
        prompt=job.prompt,
        width=side_px,
        height=side_px,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        scheduler=job.scheduler,
        seed=job.seed,
    )
    return Work.of(family, request, str(job.seed), decode=False)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of a few calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
