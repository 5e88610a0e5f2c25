"""``python -m benchmarks.lora``: eight jobs with eight adapters in one batch.

Against the same batch without adapters, and against one job after another with fused weights, which cost what the plain network costs.
The bundled model on one thread of a CPU; the thread's own time, in turns, medians and ranges of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentline.jobs import StoredLora
from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.planner import Planner
from latentline_worker.engine.request import Work
from latentline_worker.models import bundled_model, registry
from latentline_worker.models.base import Family
from latentline_worker.models.lora import Folder

from .runners import to_work
from .trace import PROMPTS, Job

JOBS, STEPS, RANK = 8, 10, 16
LAYERS = {
    "attention, feed-forward, projections": r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)$",
    "convolutions as well": r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut)$",
}


class Whole(CostModel):
    """All rows in every step: what is compared is the forward."""

    def budget(self, lane: Any) -> int:
        return self.limit(lane)


def write_adapters(folder: Path, unet: torch.nn.Module, ends: str) -> int:
    """Eight adapters of random updates for the layers whose names match; how many layers that are."""
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and re.search(ends, name)
    }
    for number in range(JOBS):
        generator, updates = torch.Generator().manual_seed(number), {}
        for name, layer in layers.items():
            more = (1, 1) if isinstance(layer, torch.nn.Conv2d) else ()
            updates[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, *layer.weight.shape[1:], generator=generator) * 0.05
            updates[f"unet.{name}.lora_B.weight"] = torch.randn(len(layer.weight), RANK, *more, generator=generator) * 0.05
        save_file(updates, folder / f"adapter{number}.safetensors")
    return len(layers)


def engine_of(family: Family) -> Engine:
    engine = Engine([family], max_rows=JOBS)
    engine.warm_up()
    engine.planner = Planner(Whole(JOBS))
    return engine


def works_of(family: Family, with_adapters: bool) -> list[Work]:
    """Unguided jobs, one row each."""
    made = []
    for number in range(JOBS):
        work = to_work(family, Job(PROMPTS[number], "ddim", STEPS, 0.0, number), family.info.default_width)
        if with_adapters:
            request = work.request.model_copy(update={"loras": (StoredLora(name=f"adapter{number}"),)})
            work = Work.of(family, request, str(number), decode=False)
        made.append(work)
    return made


def seconds(engine: Engine, works: Sequence[Work]) -> float:
    """Of this thread, for all of these jobs together."""
    for work in works:
        engine.submit(dataclasses.replace(work))
    started = time.thread_time()
    while not engine.idle:
        engine.step()
    return time.thread_time() - started


def measure(ends: str, rounds: int) -> dict[str, Any]:
    """Throughput with adapters against the two others."""
    family = bundled_model.load(torch.device("cpu"), torch.float32)
    plain = engine_of(bundled_model.load(torch.device("cpu"), torch.float32))
    without = works_of(plain.families[family.info.id], False)
    with tempfile.TemporaryDirectory() as folder:
        num_layers = write_adapters(Path(folder), family.unet, ends)  # type: ignore[attr-defined]
        registry.add_adapters(family, [Folder(Path(folder))], slots=JOBS, rank=RANK)
        engine = engine_of(family)
        adapted = works_of(family, True)
        for one, jobs in ((engine, adapted), (plain, without), (plain, without[:1])):
            seconds(one, jobs)  # recorded, and in their slots
        times: dict[str, list[float]] = {"adapters": [], "without": [], "fused one by one": []}
        for _ in range(rounds):
            times["adapters"].append(seconds(engine, adapted))
            times["without"].append(seconds(plain, without))
            times["fused one by one"].append(sum(seconds(plain, [work]) for work in without))
    own = times["adapters"]
    ratios = {
        name: [other / one for one, other in zip(own, times[name], strict=True)] for name in ("without", "fused one by one")
    }  # fmt: skip
    return {
        "layers": num_layers,
        "seconds_of_a_step": {name: round(statistics.median(values) / STEPS, 4) for name, values in times.items()},
        "throughput_vs": {
            name: {"median": round(statistics.median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}
            for name, values in ratios.items()
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    figures = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}", "jobs": JOBS, "rank": RANK}
    for name, ends in LAYERS.items():
        figures[name] = measure(ends, options.rounds)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
