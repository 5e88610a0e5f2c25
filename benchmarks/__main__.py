"""``make bench``: one arrival trace through plain diffusers, static batches and the engine, side by side in one process.

All run the same model with the same seeds, without decoding. Quote ratios within one run only: absolute times vary between
machines, and on one machine from hour to hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentline_worker.engine.engine import Engine
from latentline_worker.models import bundled_model

from . import report, runners, trace

ROUNDS = 5
COMPUTE_BOUND_PX = 256  # 64x64 latents: on a CPU one row keeps all cores busy, so that batching gains nothing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer jobs, one load: under 3 minutes on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here (PNG)")
    options = parser.parse_args()
    figures = measure(options.quick)
    report.show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        report.plot(figures, options.plot)


class Bench:
    """The bundled model on a CPU as a plain pipeline and in an engine that is warm."""

    def __init__(self) -> None:
        self.family = bundled_model.load(torch.device("cpu"), torch.float32)
        self.pipeline = bundled_model.pipeline()
        self.pipeline.set_progress_bar_config(disable=True)
        self.engine = Engine([self.family])
        self.engine.warm_up()
        self.side = self.family.info.default_width
        self.recorded = bundled_model.pipeline()
        self.recorded.set_progress_bar_config(disable=True)
        runners.record(self.recorded, self.engine.networks[self.family.info.id])

    def compile_samplers(self, jobs: Sequence[trace.Job]) -> None:
        """A worker compiles each once."""
        for job in jobs:
            runners.to_work(self.family, job, self.side)


def measure(quick: bool) -> dict[str, Any]:
    """All figures with the bundled model on a CPU."""
    started = time.perf_counter()
    bench = Bench()
    static, closed_figures = measure_closed(bench, quick)
    figures = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", **closed_figures}
    for percent in (80,) if quick else (50, 80, 95):
        figures[f"open{percent}"] = measure_open(bench, percent, static.throughput(), quick)
    figures["equal"] = measure_equal(bench, quick)
    figures["compute_bound"] = measure_compute_bound(bench, quick)
    figures["took_s"] = time.perf_counter() - started
    return report.rounded(figures)


def measure_closed(bench: Bench, quick: bool) -> tuple[runners.Run, dict[str, Any]]:
    """All jobs present from the start. Also returns the run with static batches, to which the loads below refer."""
    pipeline, engine, side = bench.pipeline, bench.engine, bench.side
    jobs = trace.closed(24 if quick else 48)
    bench.compile_samplers(jobs)
    runners.pipelines(jobs[:2], pipeline, side, batched=False)  # warm-up, as the engine had
    alone = runners.pipelines(jobs, pipeline, side, batched=False)
    static = runners.pipelines(jobs, pipeline, side, batched=True)
    ours = runners.engine(jobs, engine, side)
    recorded = runners.pipelines(jobs, bench.recorded, side, batched=False)
    recorded_static = runners.pipelines(jobs, bench.recorded, side, batched=True)
    floor_s = runners.bare_network(engine, ours.batch_rows, side)
    return static, {
        "row_budget": engine.planner.cost.budget(next(iter(engine.lanes))),
        "closed": {
            "jobs": len(jobs),
            "throughput_vs_one_by_one": alone.makespan_s / ours.makespan_s,
            "throughput_vs_static": static.makespan_s / ours.makespan_s,
            "throughput_vs_recorded_one_by_one": recorded.makespan_s / ours.makespan_s,
            "throughput_vs_recorded_static": recorded_static.makespan_s / ours.makespan_s,
            "bare_network_share": floor_s / ours.busy_s,
            **report.summary(one_by_one=alone, static=static, recorded=recorded, recorded_static=recorded_static, engine=ours),
        },
        "outside_forward_share": 1 - ours.forward_s / ours.step_s,
    }


def measure_equal(bench: Bench, quick: bool) -> dict[str, Any]:
    """Equal jobs against static batches of 8 with the same forward: static's best case. Both run the same forwards."""
    jobs = trace.equal(16 if quick else 24)
    bench.compile_samplers(jobs)
    rows = sum(job.rows for job in jobs[: trace.MAX_STATIC_BATCH])
    engine = Engine([bench.family], max_rows=rows)
    engine.networks.update(bench.engine.networks)  # recorded already
    runners.engine(jobs[: trace.MAX_STATIC_BATCH], engine, bench.side)
    for key in engine.lanes:
        engine.planner.cost.explore(key, rows)  # static batches do not look for the best size either
    ratios, forwards = [], []
    for _ in range(ROUNDS):  # in turns, so that other work on the machine meets both
        static, ours = runners.pipelines(jobs, bench.recorded, bench.side, batched=True), runners.engine(jobs, engine, bench.side)
        ratios.append(static.makespan_s / ours.makespan_s)
        forwards.append((sum(static.batch_rows.values()), sum(count for rows, count in ours.batch_rows.items() if rows)))
    return {
        "jobs": len(jobs),
        "forwards_static": forwards[0][0],
        "forwards_engine": forwards[0][1],
        "throughput_vs_recorded_static": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def measure_open(bench: Bench, percent: int, static_throughput: float, quick: bool) -> dict[str, Any]:
    """Jobs that arrive at random, at this load of what static batches can do."""
    pipeline, engine, side = bench.pipeline, bench.engine, bench.side
    rate = percent / 100 * static_throughput
    arrivals = trace.poisson(trace.closed(36 if quick else 100, seed=percent), rate, seed=percent)
    bench.compile_samplers(arrivals)
    static, ours = runners.pipelines(arrivals, pipeline, side, batched=True), runners.engine(arrivals, engine, side)
    more: dict[str, Any] = {}
    if not quick:  # one by one falls ever further behind at these rates, so the run takes long
        more["bare_network_share"] = runners.bare_network(engine, ours.batch_rows, side) / ours.busy_s
        more |= report.summary(one_by_one=runners.pipelines(arrivals, pipeline, side, batched=False))
    return {
        "jobs": len(arrivals),
        "arrivals_per_s": rate,
        "mean_latency_vs_static": ours.mean_s() / static.mean_s(),
        "p99_latency_vs_static": ours.quantile_s(0.99) / static.quantile_s(0.99),
        "short_p50_vs_static": ours.quantile_s(0.5, short=True) / static.quantile_s(0.5, short=True),
        **report.summary(static=static, engine=ours),
        **more,
    }


def measure_compute_bound(bench: Bench, quick: bool) -> dict[str, Any]:
    """Images so large that batching gains nothing on a CPU."""
    jobs = trace.closed(6 if quick else 16, seed=1, steps=(3, 7))
    runners.engine(jobs[:1], bench.engine, COMPUTE_BOUND_PX)
    alone = runners.pipelines(jobs, bench.pipeline, COMPUTE_BOUND_PX, batched=False)
    ours = runners.engine(jobs, bench.engine, COMPUTE_BOUND_PX)
    return {
        "jobs": len(jobs),
        "side_px": COMPUTE_BOUND_PX,
        "throughput_vs_one_by_one": alone.makespan_s / ours.makespan_s,
        "mean_latency_vs_one_by_one": ours.mean_s() / alone.mean_s(),
        **report.summary(one_by_one=alone, engine=ours),
    }


if __name__ == "__main__":
    main()
