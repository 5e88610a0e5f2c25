"""``python -m benchmarks.mixed``: traces that mix families, samplers and adapters, and traces of equal jobs, through one engine.

Against plain diffusers pipelines, one job after another and in static batches of the jobs that are alike. All jobs are there from the
start. One thread of a CPU; the thread's own time, so that other work on the machine counts little; in turns, medians and ranges.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import save_file

from latentline.jobs import StoredLora
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.request import Work
from latentline_worker.models import bundled_model, registry
from latentline_worker.models.base import Family
from latentline_worker.models.lora import Folder
from latentline_worker.models.sd3 import StableDiffusion3
from latentline_worker.models.z_image import ZImage
from latentline_worker.samplers import make_scheduler

from . import small_models
from .runners import to_work
from .trace import MAX_STATIC_BATCH, PROMPTS, Job

CPU = torch.device("cpu")
SIDE_PX = 64
RANK = 8
TEXTS = tuple(f"{prompt}, a photograph in soft light" for prompt in PROMPTS)  # 40 to 50 tokens of Z-Image's small tokenizer
LAYERS = r"attn.*(to_q|to_v|to_out\.0)$|attention\.(to_q|to_v|to_out\.0)$"  # that adapters change
ADAPTERS: tuple[tuple[str, ...], ...] = ((), (), ("one",), ("two",), ("one", "two"))
SCHEDULERS = {"sd": ("ddim", "euler", "dpmpp_2m", "unipc"), "sd3": ("euler", "dpmpp_2m", "unipc"), "z": ("euler", "lcm")}


@dataclass(frozen=True)
class Ask:
    """A job for one of the models, with adapters of its own."""

    model: str
    job: Job
    loras: tuple[str, ...] = ()

    def alike(self, other: Ask) -> bool:
        """Whether one call of a pipeline can make both."""
        parts = [(ask.model, ask.job.steps, ask.job.scheduler, ask.job.guidance_scale, ask.loras) for ask in (self, other)]
        return parts[0] == parts[1]


def mixed(count: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        model = rng.choice(list(SCHEDULERS))
        job = Job(rng.choice(TEXTS), rng.choice(SCHEDULERS[model]), rng.randint(4, 12), rng.choice((0.0, 5.0)), seed=number)
        asks.append(Ask(model, job, rng.choice(ADAPTERS)))
    return asks


def equal(model: str, count: int) -> list[Ask]:
    return [Ask(model, Job(TEXTS[i % len(TEXTS)], SCHEDULERS[model][0], 8, 5.0, seed=i)) for i in range(count)]


class Models:
    """The models as plain pipelines, with their adapters loaded, and in one engine that is warm."""

    def __init__(self, folder: Path) -> None:
        self.pipelines: dict[str, Any] = {"sd": bundled_model.pipeline(), "sd3": small_models.sd3(), "z": small_models.z_image()}
        makers: dict[str, Callable[[Any], Family]] = {
            "sd": lambda _: bundled_model.load(CPU, torch.float32),
            "sd3": lambda pipeline: StableDiffusion3("sd3", pipeline, CPU, torch.float32),
            "z": lambda pipeline: ZImage("z", pipeline, CPU, torch.float32),
        }
        self.families: dict[str, Family] = {}
        for name, pipeline in self.pipelines.items():
            family = makers[name](copy.deepcopy(pipeline))
            family.info = family.info.model_copy(update={"id": name, "default_width": SIDE_PX, "default_height": SIDE_PX})
            pipeline.set_progress_bar_config(disable=True)
            (folder / name).mkdir()
            made = {adapter: _updates(pipeline, seed) for seed, adapter in enumerate(("one", "two"))}
            for adapter, updates in made.items():
                path = folder / name / f"{adapter}.safetensors"
                save_file(updates, path)
                pipeline.load_lora_weights(path, adapter_name=adapter)
            registry.add_adapters(family, [Folder(folder / name)], slots=len(set(ADAPTERS)), rank=2 * RANK)
            self.families[name] = family
        self.engine = Engine(list(self.families.values()))
        self.engine.warm_up()

    def work(self, ask: Ask) -> Work:
        family = self.families[ask.model]
        work = to_work(family, ask.job, SIDE_PX)
        if not ask.loras:
            return work
        request = work.request.model_copy(update={"loras": tuple(StoredLora(name=name) for name in ask.loras)})
        return Work.of(family, request, str(ask.job.seed), decode=False)

    def continuous(self, asks: Sequence[Ask]) -> float:
        """Seconds of this thread."""
        works = [self.work(ask) for ask in asks]
        started = time.thread_time()
        requests = [self.engine.submit(work) for work in works]
        while not self.engine.idle:
            self.engine.step()
        took = time.thread_time() - started
        for request in requests:
            request.result(0)
        return took

    def plain(self, asks: Sequence[Ask], most: int) -> float:
        """The same by diffusers, up to ``most`` jobs that are alike in a call."""
        left, started = list(asks), time.thread_time()
        while left:
            batch = [ask for ask in left if ask.alike(left[0])][:most]
            left = [ask for ask in left if ask not in batch]
            self._call(batch)
        return time.thread_time() - started

    def _call(self, batch: Sequence[Ask]) -> None:
        first, pipeline = batch[0], self.pipelines[batch[0].model]
        config = self.families[first.model].scheduler_config  # type: ignore[attr-defined]
        pipeline.scheduler = make_scheduler(first.job.scheduler, config)
        if first.loras:
            pipeline.enable_lora()
            pipeline.set_adapters(list(first.loras))
        else:
            pipeline.disable_lora()
        pipeline(
            [ask.job.prompt for ask in batch],
            num_inference_steps=first.job.steps,
            guidance_scale=first.job.guidance_scale,
            width=SIDE_PX,
            height=SIDE_PX,
            generator=[torch.Generator().manual_seed(ask.job.seed) for ask in batch],
            output_type="latent",
        )


def _updates(pipeline: Any, seed: int) -> dict[str, torch.Tensor]:
    """An adapter of random updates for the attention of the denoiser."""
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    generator, updates = torch.Generator().manual_seed(seed), {}
    for name, layer in getattr(pipeline, part).named_modules():
        if isinstance(layer, torch.nn.Linear) and re.search(LAYERS, name):
            updates[f"{part}.{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=generator) * 0.05
            updates[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=generator) * 0.05
    return updates


def compare(models: Models, asks: Sequence[Ask], rounds: int) -> dict[str, Any]:
    """Throughput of the engine against the two others."""
    models.continuous(asks)  # recorded, compiled and in their slots
    if all(ask.job.steps == asks[0].job.steps for ask in asks):  # static batches do not look for the best size either
        for key in models.engine.lanes:
            models.engine.planner.cost.explore(key, 2 * MAX_STATIC_BATCH)
    models.plain(asks[:2], 1)
    times: dict[str, list[float]] = {"continuous": [], "static": [], "one by one": []}
    for _ in range(rounds):
        times["continuous"].append(models.continuous(asks))
        times["static"].append(models.plain(asks, MAX_STATIC_BATCH))
        times["one by one"].append(models.plain(asks, 1))
    ratios = {name: [other / own for other, own in zip(times[name], times["continuous"], strict=True)] for name in ("static", "one by one")}
    return {
        "jobs": len(asks),
        "seconds": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "throughput_vs": {
            name: {"median": round(statistics.median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}
            for name, values in ratios.items()
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=24, help="of each trace")
    parser.add_argument("--trace", action="append", choices=("mixed", "equal"), help="only this kind; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        traces = {"mixed": mixed(options.jobs, seed=0), **{f"equal {name}": equal(name, options.jobs // 3) for name in SCHEDULERS}}
        for name, asks in traces.items():
            if options.trace and name.split()[0] not in options.trace:
                continue
            figures[name] = compare(models, asks, options.rounds)
            print(json.dumps({name: figures[name]}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
