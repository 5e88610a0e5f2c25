"""What ``latentline train`` does: recipe, data, memory check, then the loop. Each command resumes by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from . import fits, recipe
from .autoencoder import AutoencoderTask, make_model
from .build import build
from .denoiser import DenoiserTask
from .distill import DistillRecipe, DistillTask, check_teacher
from .errors import TrainingError
from .export import export as write_weights
from .export import place_of
from .inputs import class_name, data_key, find_device, find_recipe, load_model, open_source
from .latents import LatentCache
from .loop import Task, Training
from .lora import LoraRecipe, LoraTask
from .manifest import find_leaks
from .package import package as write_package
from .package import prediction_of
from .processes import processes
from .progress import progress
from .recipe import AutoencoderRecipe, DenoiserRecipe
from .sources import BuiltData
from .style import write_style

Say = Callable[[str], None]
R = TypeVar("R", DistillRecipe, LoraRecipe)


def data(folder: Path, packages: Path | None, say: Say) -> None:
    """Build the bundled model's data set and check it for leaks."""
    build(folder, say, packages)
    check(folder, recipe.DenoiserRecipe.compositions, say)


def check(folder: Path, compositions: int, say: Say) -> None:
    """Look for held-out things in all that a training with so many cached compositions sees.

    Raises:
        TrainingError: something leaks; the message names the first findings.
    """
    source = BuiltData(folder, 128)
    trained = [source.composition(index, number) for number in range(compositions) for index in range(source.num_items)]
    if leaks := find_leaks(folder, trained):
        raise TrainingError(f"{folder}: {len(leaks)} leaks: " + "; ".join(leaks[:5]))
    say(f"{len(trained)} compositions of {source.num_items} pictures: nothing that is held out is among them")


@dataclass(frozen=True)
class Run:
    """Where and how a training runs; none of it changes what is learned, but for weights to begin with.

    Args:
        out: folder of state, log, samples and model.
        init: weights in diffusers format to begin with where ``out`` holds no state; exported ones go on at their step.
        threads: of torch; its own choice when not given.
        device: of torch; a GPU where there is one when not given.
    """

    out: Path
    init: Path | None = None
    threads: int | None = None
    device: str | None = None

    def prepare(self) -> torch.device:
        """Set the number of threads and find the device.

        Raises:
            TrainingError: torch has no such device.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        return find_device(self.device)


def autoencoder(recipe_name: str, folder: Path, run: Run, say: Say) -> bool:
    """Train an autoencoder; False where it was stopped before its end."""
    made = find_recipe(recipe_name, AutoencoderRecipe)
    device = run.prepare()
    with processes(device) as rank:
        say = say if rank == 0 else _silent
        fits.check_autoencoder(made, device)
        model = load_model(run.init, made.model["class"]) if run.init else None
        return _train(AutoencoderTask(made, open_source(folder, made.size_px, say, False), model, device), run, say, rank)


def denoiser(recipe_name: str, folder: Path, autoencoder_folder: Path, run: Run, say: Say) -> bool:
    """Train a denoiser on an autoencoder's latents; False where it was stopped before its end."""
    made = find_recipe(recipe_name, DenoiserRecipe)
    device = run.prepare()
    with processes(device) as rank:
        say = say if rank == 0 else _silent
        cache = _cache(folder, made.size_px, autoencoder_folder, run, say, device, rank)
        fits.check_denoiser(made, cache, device)
        model = load_model(run.init, made.model["class"]) if run.init else make_model(made.model, made.schedule.seed)
        return _train(DenoiserTask(made, cache, model, device), run, say, rank)


def distill(recipe_name: str, folder: Path, autoencoder_folder: Path, denoiser_folder: Path, run: Run, say: Say) -> bool:
    """Distil a denoiser into a few steps; False where it was stopped before its end."""
    made = find_recipe(recipe_name, DistillRecipe)
    check_teacher(prediction_of(denoiser_folder), denoiser_folder)
    return _train_from(made, DistillTask, folder, autoencoder_folder, denoiser_folder, run, say)


def lora(recipe_name: str, folder: Path, autoencoder_folder: Path, denoiser_folder: Path, run: Run, say: Say) -> bool:
    """Train an adapter for a denoiser; False where it was stopped before its end."""
    made = find_recipe(recipe_name, LoraRecipe)
    known = prediction_of(denoiser_folder)
    if known not in (None, made.prediction):
        raise TrainingError(f"{denoiser_folder}: predicts {known}, and the recipe's prediction is {made.prediction}")
    return _train_from(made, LoraTask, folder, autoencoder_folder, denoiser_folder, run, say)


def _train_from(
    made: R,
    make_task: Callable[[R, LatentCache, torch.nn.Module, torch.device], Task],
    folder: Path,
    autoencoder_folder: Path,
    denoiser_folder: Path,
    run: Run,
    say: Say,
) -> bool:
    """Train what begins with a denoiser; False where it was stopped before its end."""
    device = run.prepare()
    with processes(device) as rank:
        say = say if rank == 0 else _silent
        cache = _cache(folder, made.size_px, autoencoder_folder, run, say, device, rank)
        model = load_model(denoiser_folder, "UNet2DConditionModel")
        fits.check_copy(made, cache, model, device)
        return _train(make_task(made, cache, model, device), run, say, rank)


def package(autoencoder_folder: Path, denoiser_folder: Path, target: Path, say: Say) -> None:
    """Put the parts of a model into one folder in diffusers format."""
    write_package(autoencoder_folder, denoiser_folder, target)
    say(f"wrote {target}: a model that diffusers loads")


def style(folder: Path, target: Path, count: int, say: Say) -> None:
    """Write pictures of the held-back style as a folder to train an adapter on."""
    say(f"wrote {write_style(folder, target, count)} pictures with captions into {target}")


def _cache(folder: Path, size_px: int, autoencoder_folder: Path, run: Run, say: Say, device: torch.device, rank: int) -> LatentCache:
    vae = load_model(autoencoder_folder, class_name(autoencoder_folder))
    return LatentCache(run.out, open_source(folder, size_px, say, True), vae, f"{data_key(folder)}/{size_px}", say, device, rank)


def _silent(line: str) -> None:
    """Of several processes, the first one speaks."""


def export(run_folder: Path, target: Path, say: Say) -> None:
    """Write a training's weights in fp16."""
    step = write_weights(run_folder, target)
    say(f"wrote {target}: the weights of step {step}")


def _train(task: Task, run: Run, say: Say, rank: int) -> bool:
    total = task.recipe.schedule.steps
    with progress(total, shown=rank == 0) as on_step:
        training = Training(task, run.out, say, on_step, rank)
        if training.resume():
            say(f"going on at step {training.step} of {total}" + (f"; {run.init} is not read" if run.init else ""))
        elif run.init and (step := place_of(run.init)):
            training.begin_at(step)
            say(f"going on from {run.init} at step {step} of {total}, with fresh optimisers")
        with training.stop_on_signals():
            done = training.run()
    say(f"the model is in {run.out}" if done else f"stopped at step {training.step}: the same command goes on from there")
    return done
