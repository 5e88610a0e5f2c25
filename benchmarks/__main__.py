"""``make bench``: a closed load of mixed jobs through plain diffusers, one by one, and through the engine.

Both run in one process on the same bundled model, the same jobs and seeds, without decoding; the figure is the ratio of
their times. Static batching and open load are not measured yet.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch

from latentline.jobs import SCHEDULERS
from latentline_worker.engine.conditioning import Conditioner
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.request import Work
from latentline_worker.models import bundled_model
from latentline_worker.samplers import make_scheduler, sampler_table

Job = tuple[str, str, int, float, int]  # prompt, scheduler, steps, guidance, seed


def make_jobs(count: int) -> list[Job]:
    """Step counts U{4..50}, mixed schedulers and guidance."""
    rng = random.Random(0)
    things = ("a cat", "a rocket", "a red apple", "a robot", "a house")
    return [(rng.choice(things), rng.choice(SCHEDULERS), rng.randint(4, 50), rng.choice((1.0, 3.0, 5.0)), i) for i in range(count)]


def one_by_one(jobs: list[Job]) -> float:
    """Seconds through plain pipelines, one after the other."""
    pipeline = bundled_model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    config = dict(pipeline.scheduler.config)
    start = time.perf_counter()
    for prompt, scheduler, steps, guidance, seed in jobs:
        pipeline.scheduler = make_scheduler(scheduler, config)
        generator = torch.Generator().manual_seed(seed)
        pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent")
    return time.perf_counter() - start


def together(jobs: list[Job], max_rows: int) -> tuple[float, int]:
    """Seconds through the engine, and the number of forwards."""
    family = bundled_model.load(torch.device("cpu"), torch.float32)
    engine, conditioner = Engine(family, max_rows), Conditioner(family)
    shape = family.latent_shape(64, 64)
    start = time.perf_counter()
    requests = []
    for prompt, scheduler, steps, guidance, seed in jobs:
        table = sampler_table(scheduler, family.scheduler_config, steps)
        uncond = conditioner.encode("") if guidance > 1 else None
        requests.append(engine.submit(Work(str(seed), shape, table, guidance, (seed,), conditioner.encode(prompt), uncond)))
    engine.start()
    for request in requests:
        request.future.result()
    elapsed = time.perf_counter() - start
    engine.stop()
    return elapsed, engine.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--jobs", type=int, default=48)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    jobs = make_jobs(options.jobs)
    together(jobs[:4], options.max_rows)  # warm-up
    alone_s = one_by_one(jobs)
    engine_s, forwards = together(jobs, options.max_rows)
    figures = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "closed": {
            "jobs": len(jobs),
            "one_by_one_s": round(alone_s, 2),
            "engine_s": round(engine_s, 2),
            "engine_forwards": forwards,
            "throughput_vs_one_by_one": round(alone_s / engine_s, 3),
        },
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
