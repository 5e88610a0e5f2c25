"""A fleet in simulated time, with the engine's own planner and cost model: policies can be compared on 100,000 jobs.

A simulated worker has no tensors, and otherwise works as a real one: it takes jobs from a shared queue while it has room,
and before each step asks the same :class:`Planner` which of them take part. Step times come from a file of measured
costs. ``python -m benchmarks.simulate --measure FILE`` writes one on this machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.planner import OLDEST_EVERY, Planner

from . import trace
from .trace import MAX_STATIC_BATCH, Job

COSTS = Path(__file__).parent / "step_costs.json"
MEASURED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class StepCosts:
    """Seconds of a step by rows: linear between measured points, extrapolated with the last slope."""

    def __init__(self, points: dict[int, float]) -> None:
        self._rows, self._seconds = zip(*sorted(points.items()), strict=True)

    def __call__(self, rows: int) -> float:
        place = min(max(1, bisect_left(self._rows, rows)), len(self._rows) - 1)
        (low, high), (low_s, high_s) = self._rows[place - 1 : place + 1], self._seconds[place - 1 : place + 1]
        return float(low_s + (high_s - low_s) * (rows - low) / (high - low))


@dataclass(eq=False)
class InFlight:
    """A job as the planner sees it."""

    job: Job
    arrival: int
    remaining: int
    bound_steps: int = 0  # worker steps within which it must end, by the planner's stated bound
    claimed_at_step: int = 0
    priority: int = 5
    deadline: float | None = None
    lane: str = "lane"
    tenant: str = "default"

    @property
    def rows(self) -> int:
        return self.job.rows


@dataclass
class Worker:
    planner: Planner
    active: list[InFlight] = field(default_factory=list)
    steps: int = 0


@dataclass
class Result:
    """Latencies of all jobs, when the last one ended, and the largest share of its bound on waiting that any job used."""

    latency_s: list[float]
    makespan_s: float
    nearest_to_bound: float = 0.0

    def figures(self) -> dict[str, float]:
        ordered = sorted(self.latency_s)
        return {
            "jobs_per_s": len(ordered) / self.makespan_s,
            "mean_s": statistics.mean(ordered),
            "p50_s": ordered[len(ordered) // 2],
            "p99_s": ordered[int(0.99 * len(ordered))],
            "longest_s": ordered[-1],
        }


def engine_fleet(jobs: Sequence[Job], costs: StepCosts, workers: int, concurrency: int) -> Result:
    """Step-level batching on every worker. Jobs wait in one queue, in order of arrival, until a worker has room."""
    model = CostModel(max_rows=64)  # shared by the fleet: equal machines would learn the same
    fleet = [Worker(Planner(model)) for _ in range(workers)]
    waiting, latency, nearest = deque[InFlight](), [], 0.0
    events: list[tuple[float, int, int]] = [(job.arrival_s, 0, i) for i, job in enumerate(jobs)]  # time, 0 arrival or 1 step, which
    heapq.heapify(events)
    batches: dict[int, list[InFlight]] = {}
    idle = set(range(workers))
    now = 0.0

    def take(worker: Worker) -> None:
        while waiting and len(worker.active) < concurrency:
            request = waiting.popleft()
            request.claimed_at_step = worker.steps
            older = sum(other.remaining for other in worker.active if other.arrival < request.arrival)
            request.bound_steps = OLDEST_EVERY * (request.remaining + older)
            worker.active.append(request)

    def begin(number: int) -> None:
        worker = fleet[number]
        take(worker)
        if not worker.active:
            idle.add(number)
            return
        batch = worker.planner.select(worker.active)
        rows = sum(request.rows for request in batch)
        seconds = costs(rows)
        model.observe("lane", rows, seconds)
        batches[number] = batch
        heapq.heappush(events, (now + seconds, 1, number))

    while events:
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            waiting.append(InFlight(jobs[which], which, jobs[which].steps))
            if idle:
                begin(idle.pop())
            continue
        worker = fleet[which]
        worker.steps += 1
        for request in batches.pop(which):
            request.remaining -= 1
            if request.remaining == 0:
                worker.active.remove(request)
                latency.append(now - request.job.arrival_s)
                nearest = max(nearest, (worker.steps - request.claimed_at_step) / request.bound_steps)
        begin(which)
    return Result(latency, now, nearest)


def static_fleet(jobs: Sequence[Job], costs: StepCosts, workers: int) -> Result:
    """Jobs run in order of arrival. Waiting jobs of the first one's kind share its batch from start to end."""
    waiting: OrderedDict[int, Job] = OrderedDict()
    alike: dict[tuple[int, str, float], OrderedDict[int, None]] = {}
    latency: list[float] = []
    events: list[tuple[float, int, int]] = [(job.arrival_s, 0, i) for i, job in enumerate(jobs)]
    heapq.heapify(events)
    running: dict[int, list[Job]] = {}
    idle = list(range(workers))
    now = 0.0
    while events:
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            job = jobs[which]
            waiting[which] = job
            alike.setdefault((job.steps, job.scheduler, job.guidance_scale), OrderedDict())[which] = None
        else:
            latency += [now - job.arrival_s for job in running.pop(which)]
            idle.append(which)
        while idle and waiting:
            head = next(iter(waiting.values()))
            group = alike[head.steps, head.scheduler, head.guidance_scale]
            batch = [waiting.pop(group.popitem(last=False)[0]) for _ in range(min(MAX_STATIC_BATCH, len(group)))]
            number = idle.pop()
            running[number] = batch
            heapq.heappush(events, (now + head.steps * costs(sum(job.rows for job in batch)), 1, number))
    return Result(latency, now)


def measure_costs() -> dict[int, float]:
    """Median step seconds of the bundled model on this machine, by rows."""
    import torch

    from latentline_worker.engine.engine import Engine
    from latentline_worker.models import bundled_model

    from .runners import network_inputs, to_work

    family = bundled_model.load(torch.device("cpu"), torch.float32)
    engine = Engine([family])
    engine.warm_up()
    work = to_work(family, trace.Job("", family.info.first_scheduler, 20, 1.0, 0), family.info.default_width)
    points = {}
    with torch.inference_mode():
        (row,) = family.rows(work.request, family.encode(work.texts))
        for rows in MEASURED_ROWS:
            inputs = network_inputs(family, work, row, rows)
            times = []
            for _ in range(25):
                started = time.perf_counter()
                engine.networks[family.info.id](*inputs)
                times.append(time.perf_counter() - started)
            points[rows] = statistics.median(times)
    return points


def simulate(num_jobs: int, workers: int, load: float, concurrency: int, costs: StepCosts) -> dict[str, Any]:
    """Both policies on one Poisson trace, at a share of static batching's throughput with a full queue."""
    started = time.perf_counter()
    jobs = trace.closed(num_jobs)
    capacity = static_fleet(trace.closed(min(num_jobs, 500 * workers), seed=1), costs, workers).figures()["jobs_per_s"]
    timed = trace.poisson(jobs, load * capacity, seed=2)
    static, engine = static_fleet(timed, costs, workers), engine_fleet(timed, costs, workers, concurrency)
    return {
        "workers": workers,
        "jobs": num_jobs,
        "load": load,
        "concurrency": concurrency,
        "static": static.figures(),
        "engine": engine.figures(),
        "mean_vs_static": engine.figures()["mean_s"] / static.figures()["mean_s"],
        "p99_vs_static": engine.figures()["p99_s"] / static.figures()["p99_s"],
        "nearest_to_bound": engine.nearest_to_bound,
        "took_s": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--load", type=float, default=0.9, help="share of static batching's capacity")
    parser.add_argument("--concurrency", type=int, default=16, help="jobs in flight per worker")
    parser.add_argument("--costs", type=Path, default=COSTS, help="measured step costs (JSON)")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure step costs on this machine, write them, and stop")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.measure:
        options.measure.write_text(json.dumps({"machine": _machine(), "step_seconds": measure_costs()}, indent=2) + "\n")
        return
    costs = StepCosts({int(rows): seconds for rows, seconds in json.loads(options.costs.read_text())["step_seconds"].items()})
    figures = simulate(options.jobs, options.workers, options.load, options.concurrency, costs)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _machine() -> str:
    import platform

    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bundled model at 64 px"


if __name__ == "__main__":
    main()
