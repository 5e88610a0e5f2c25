"""``python -m benchmarks.latent_vs_pixel``: what latents buy, on equal data and equal CPU time.

Three U-Nets with the same core are trained for so many CPU-minutes each: on latents with rectified flow, on latents with
v-prediction, on pixels with rectified flow. Then their pictures of held-out prompts are measured with the evaluation's frozen
probe. The numbers of steps are chosen once, by timing a few, and kept; given again, the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentline_worker.evaluation.ceilings import renders
from latentline_worker.evaluation.likeness import kid, picture_features
from latentline_worker.evaluation.measures import look
from latentline_worker.evaluation.probe import load
from latentline_worker.evaluation.prompts import Prompt, load_prompts
from latentline_worker.evaluation.results import figures_of
from latentline_worker.training import memory
from latentline_worker.training.autoencoder import make_model
from latentline_worker.training.denoiser import DenoiserTask
from latentline_worker.training.inputs import class_name, data_key, find_recipe, load_model
from latentline_worker.training.latents import LatentCache
from latentline_worker.training.loop import Training
from latentline_worker.training.objectives import make_scheduler
from latentline_worker.training.recipe import DenoiserRecipe, Schedule
from latentline_worker.training.sheets import save_sheet, to_images
from latentline_worker.training.sources import BuiltData

from .latent_vs_pixel_page import write_page

Say = Callable[[str], None]
STEPS = (4, 8, 20, 50)
GUIDANCE = 3.0
COMPOSITIONS = 4  # pictures of each item, the same ones for every side
TIMED_STEPS = 5
BATCH = 16
# Three levels more, from 128 to 16 px, above the core that the latent U-Net consists of.
PIXEL_LEVELS = {"channels": [32, 48, 64], "down": ["DownBlock2D"] * 3, "up": ["UpBlock2D"] * 3}


@dataclass(frozen=True)
class Side:
    """One of the models: its name, the space it works in, what it predicts, the numbers of steps that it is drawn with."""

    name: str
    space: str
    prediction: str
    steps: tuple[int, ...]


SIDES = (
    Side("latents, rectified flow", "latents", "flow", STEPS),
    Side("latents, v-prediction", "latents", "v_prediction", STEPS),
    Side("pixels, rectified flow", "pixels", "flow", (20,)),
)


class Pixels(torch.nn.Module):
    """An autoencoder that changes nothing: with it, a denoiser's training works on pixels."""

    config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(latents=x)

    def decode(self, z: torch.Tensor) -> Any:
        return SimpleNamespace(sample=z)


class BenchTask(DenoiserTask):
    """A denoiser's training that writes no samples: they would count as training time."""

    def finish(self, folder: Path) -> dict[str, float]:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent_vs_pixel", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data set of `latentline train data`")
    parser.add_argument("--autoencoder", type=Path, required=True, help="in diffusers format")
    parser.add_argument("--out", type=Path, required=True, help="states, pictures and figures; given again, it goes on")
    parser.add_argument("--minutes", type=float, default=30, help="CPU-minutes of training a side")
    parser.add_argument("--prompts", type=int, default=100, help="validation prompts that are drawn")
    parser.add_argument("--page", type=Path, default=Path("docs/latent-vs-pixel.md"), help="the page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.data, options.autoencoder, options.out, options.minutes, options.prompts, print)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_page(options.page, figures, options.out)


def measure(data: Path, autoencoder: Path, out: Path, minutes: float, num_prompts: int, say: Say) -> dict[str, Any]:
    """Train and measure every side; its figures by name."""
    source = BuiltData(data, 128)
    prompts = load_prompts(data, "validation", source.catalogue, num_prompts)
    real = renders(prompts, source)
    found = []
    for side in SIDES:
        say(side.name)
        vae = load_model(autoencoder, class_name(autoencoder)) if side.space == "latents" else Pixels()
        cache = LatentCache(out / side.space, source, vae, f"{data_key(data)}/{side.space}", say)
        encoding = _fill(cache, out / f"encoding-{side.space}.json")
        core = find_recipe("emoji-denoiser", DenoiserRecipe).model
        model = core if side.space == "latents" else pixel_model(core, source.size_px)
        folder = out / side.name.replace(", ", "-").replace(" ", "-")
        task = _train(side, model, cache, folder, minutes, say)
        found.append(_figures(side, task, folder, encoding) | {"quality": _quality(task, side, prompts, real, folder, say)})
    return {
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__.split('+')[0]}",
        "minutes": minutes,
        "num_prompts": len(prompts),
        "num_items": source.num_items,
        "batch": BATCH,
        "guidance": GUIDANCE,
        "sides": found,
        "real": {name: figure.to_json() for name, figure in figures_of([look(real, prompts, load())]).items()},
    }


def pixel_model(core: dict[str, Any], size_px: int) -> dict[str, Any]:
    """The latent U-Net's arguments with three levels above it, so that its core sees the same 16x16 positions."""
    return core | {
        "sample_size": size_px,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": PIXEL_LEVELS["channels"] + core["block_out_channels"],
        "down_block_types": PIXEL_LEVELS["down"] + core["down_block_types"],
        "up_block_types": core["up_block_types"] + PIXEL_LEVELS["up"],
    }


def _recipe(side: Side, model: dict[str, Any], steps: int) -> DenoiserRecipe:
    schedule = Schedule(
        steps=steps, batch=BATCH, learning_rate=6e-4, warmup_steps=min(100, steps // 4), weight_decay=0.01, ema_decay=0.99,
        sample_every_steps=10**9, log_every_steps=20,
    )  # fmt: skip
    made = DenoiserRecipe(model, schedule, prediction=side.prediction, compositions=COMPOSITIONS, first_compositions=COMPOSITIONS)
    return replace(made, density_mean=[0.5])


def _fill(cache: LatentCache, path: Path) -> float:
    """Make the cached pictures; the CPU-seconds that it took when they were made."""
    begun = time.process_time()
    cache.batch(0, 0, 0, 1, COMPOSITIONS, 0.0)
    if not path.exists():
        path.write_text(json.dumps({"cpu_s": time.process_time() - begun}) + "\n")
    return float(json.loads(path.read_text())["cpu_s"])


def _train(side: Side, model: dict[str, Any], cache: LatentCache, folder: Path, minutes: float, say: Say) -> DenoiserTask:
    """Train for as many steps as ``minutes`` of CPU time hold; the task comes back with its averaged weights."""
    plan = folder / "plan.json"
    if not plan.exists():
        folder.mkdir(parents=True, exist_ok=True)
        step_s = _step_s(side, model, cache)
        plan.write_text(json.dumps({"step_s": step_s, "steps": max(2, round(minutes * 60 / step_s)), "cpu_s": 0.0}) + "\n")
    planned = json.loads(plan.read_text())
    recipe = _recipe(side, model, planned["steps"])
    task = BenchTask(recipe, cache, make_model(model, 0))
    training = Training(task, folder, say)
    training.resume()
    before, begun = training.step, time.process_time()
    with training.stop_on_signals():
        done = training.run()
    if training.step > before:
        planned["cpu_s"] += time.process_time() - begun
        plan.write_text(json.dumps(planned) + "\n")
    if not done:
        raise SystemExit(f"stopped at step {training.step} of {planned['steps']}: the same command goes on from there")
    if training.ema:
        training.ema.copy_to(task.model.parameters())
    task.model.eval()
    return task


def _step_s(side: Side, model: dict[str, Any], cache: LatentCache) -> float:
    """CPU-seconds of a training step, the median of a few after the first."""
    training = Training(BenchTask(_recipe(side, model, 1000), cache, make_model(model, 0)), Path(), lambda line: None)
    times = []
    for training.step in range(TIMED_STEPS + 1):
        begun = time.process_time()
        training.one_step()
        times.append(time.process_time() - begun)
    return float(np.median(times[1:]))


def _figures(side: Side, task: DenoiserTask, folder: Path, encoding_s: float) -> dict[str, Any]:
    """What the side costs."""
    plan = json.loads((folder / "plan.json").read_text())
    shape, text = task.shape(), task.cache.empty
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        task.model(torch.zeros(1, *shape), torch.zeros(1), text[None])

    def run() -> torch.Tensor:
        model: Any = make_model(task.recipe.model, 0)  # type: ignore[attr-defined]
        loss: torch.Tensor = model(torch.zeros(BATCH, *shape), torch.zeros(BATCH), torch.zeros(BATCH, *text.shape)).sample.sum()
        return loss

    begun = time.process_time()
    with torch.no_grad():
        for _ in range(TIMED_STEPS):
            task.model(torch.zeros(2, *shape), torch.zeros(2), text.expand(2, -1, -1))
    return {
        "name": side.name,
        "space": side.space,
        "prediction": side.prediction,
        "values": int(np.prod(shape)),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "forward_gflop": counter.get_total_flops() / 1e9,
        "train_step_s": plan["step_s"],
        "guided_step_s": (time.process_time() - begun) / TIMED_STEPS,
        "weights_mib": memory.weights_bytes(task.model, ema=True) / 2**20,
        "activations_mib": memory.activation_bytes(run) / 2**20,
        "steps": plan["steps"],
        "cpu_minutes": plan["cpu_s"] / 60,
        "encoding_minutes": encoding_s / 60,
    }


def _quality(
    task: DenoiserTask, side: Side, prompts: list[Prompt], real: np.ndarray[Any, Any], folder: Path, say: Say
) -> dict[str, dict[str, Any]]:
    """The measures of the evaluation, by number of steps; pictures are kept in ``folder`` and drawn once."""
    probe, truth = load(), picture_features(real)
    found = {}
    for steps in side.steps:
        path = folder / f"drawn-{steps:02}.npy"
        if not path.exists():
            say(f"drawing {len(prompts)} pictures in {steps} steps")
            np.save(path, draw(task, prompts, steps))
        pictures = np.load(path)
        save_sheet(folder / f"drawn-{steps:02}.png", to_images(torch.from_numpy(pictures[:16]).permute(0, 3, 1, 2) / 127.5 - 1), columns=8)
        figures = figures_of([look(pictures, prompts, probe)])
        found[str(steps)] = {name: figure.to_json() for name, figure in figures.items()} | {
            "kernel_distance": kid(picture_features(pictures), truth)
        }
    return found


@torch.no_grad()
def draw(task: DenoiserTask, prompts: Sequence[Prompt], steps: int) -> np.ndarray[Any, Any]:
    """(n, size, size, 3) pictures, guided, each prompt from noise of its own number."""
    made = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        text = task.cache.states([prompt.words for prompt in part])
        both = torch.cat([task.cache.empty.expand_as(text), text])
        scheduler = make_scheduler(task.recipe.prediction)
        scheduler.set_timesteps(steps)
        z = torch.stack([torch.randn(task.shape(), generator=torch.Generator().manual_seed(prompt.number)) for prompt in part])
        for t in scheduler.timesteps:
            without, with_text = task.model(torch.cat([z, z]), t, both).sample.chunk(2)
            z = scheduler.step(without + GUIDANCE * (with_text - without), t, z).prev_sample
        made += [np.asarray(image) for image in to_images(task.cache.decode(z))]
    return np.stack(made)


if __name__ == "__main__":
    main()
