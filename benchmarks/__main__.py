"""``make bench``: one arrival trace through plain diffusers, static batches and the engine, side by side in one process.

All run the same model with the same seeds, without decoding. Quote ratios within one run only: absolute times vary between
machines, and on one machine from hour to hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from latentline_worker.engine.engine import Engine
from latentline_worker.models import bundled_model
from latentline_worker.samplers import sampler_table

from . import real_shapes, report, runners, trace

COMPUTE_BOUND_PX = 256  # 64x64 latents: on a CPU one row keeps all cores busy, so that batching gains nothing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer jobs, one load: under 3 minutes on two cores")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot here (PNG)")
    parser.add_argument("--real-shapes", action="store_true", help="SD 1.5 and SDXL shapes with random weights; needs a GPU")
    options = parser.parse_args()
    if options.real_shapes and not torch.cuda.is_available():
        sys.exit("benchmarks: --real-shapes needs a GPU, and there is none")
    figures = real_shapes.measure() if options.real_shapes else measure(options.quick)
    report.show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        report.plot(figures, options.plot)


def measure(quick: bool) -> dict[str, Any]:
    """All figures with the bundled model on a CPU."""
    started = time.perf_counter()
    family = bundled_model.load(torch.device("cpu"), torch.float32)
    pipeline = bundled_model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(family)
    engine.warm_up()
    side = family.info.default_width
    jobs = trace.closed(24 if quick else 48)
    for job in jobs:  # a worker compiles each once
        sampler_table(job.scheduler, family.scheduler_config, job.steps)
    runners.pipelines(jobs[:2], pipeline, side, batched=False)  # warm-up, as the engine had

    alone = runners.pipelines(jobs, pipeline, side, batched=False)
    static = runners.pipelines(jobs, pipeline, side, batched=True)
    ours = runners.engine(jobs, engine, side)
    floor_s = runners.bare_network(engine, ours.batch_rows, side)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "row_budget": engine.planner.cost.budget(next(iter(engine.lanes))),
        "closed": {
            "jobs": len(jobs),
            "throughput_vs_one_by_one": alone.makespan_s / ours.makespan_s,
            "throughput_vs_static": static.makespan_s / ours.makespan_s,
            "bare_network_share": floor_s / ours.busy_s,
            **report.summary(one_by_one=alone, static=static, engine=ours),
        },
        "outside_forward_share": 1 - ours.forward_s / ours.step_s,
    }
    for percent in (80,) if quick else (50, 80, 95):
        rate = percent / 100 * static.throughput()
        arrivals = trace.poisson(trace.closed(36 if quick else 100, seed=percent), rate, seed=percent)
        for job in arrivals:
            sampler_table(job.scheduler, family.scheduler_config, job.steps)
        open_static, open_ours = runners.pipelines(arrivals, pipeline, side, batched=True), runners.engine(arrivals, engine, side)
        more: dict[str, Any] = {}
        if not quick:  # one by one falls ever further behind at these rates, so the run takes long
            more["bare_network_share"] = runners.bare_network(engine, open_ours.batch_rows, side) / open_ours.busy_s
            more |= report.summary(one_by_one=runners.pipelines(arrivals, pipeline, side, batched=False))
        figures[f"open{percent}"] = {
            "jobs": len(arrivals),
            "arrivals_per_s": rate,
            "mean_latency_vs_static": open_ours.mean_s() / open_static.mean_s(),
            "p99_latency_vs_static": open_ours.quantile_s(0.99) / open_static.quantile_s(0.99),
            "short_p50_vs_static": open_ours.quantile_s(0.5, short=True) / open_static.quantile_s(0.5, short=True),
            **report.summary(static=open_static, engine=open_ours),
            **more,
        }

    large = trace.closed(6 if quick else 16, seed=1, steps=(3, 7))
    runners.engine(large[:1], engine, COMPUTE_BOUND_PX)
    large_alone = runners.pipelines(large, pipeline, COMPUTE_BOUND_PX, batched=False)
    large_ours = runners.engine(large, engine, COMPUTE_BOUND_PX)
    figures["compute_bound"] = {
        "jobs": len(large),
        "side_px": COMPUTE_BOUND_PX,
        "throughput_vs_one_by_one": large_alone.makespan_s / large_ours.makespan_s,
        "mean_latency_vs_one_by_one": large_ours.mean_s() / large_alone.mean_s(),
        **report.summary(one_by_one=large_alone, engine=large_ours),
    }
    figures["took_s"] = time.perf_counter() - started
    return report.rounded(figures)


if __name__ == "__main__":
    main()
