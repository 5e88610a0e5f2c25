"""What ``latentline train`` does: recipe, data, memory check, then the loop. Each command resumes by itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import diffusers
import torch

from latentline.errors import ModelError

from . import fits, recipe
from .autoencoder import AutoencoderTask
from .build import build
from .denoiser import DenoiserTask
from .errors import TrainingError
from .export import export as write_weights
from .export import place_of
from .folders import FolderData
from .latents import LatentCache
from .loop import Task, Training
from .manifest import MANIFEST, find_leaks
from .processes import processes
from .progress import progress
from .recipe import AUTOENCODERS, AutoencoderRecipe, DenoiserRecipe
from .sources import BuiltData, Source

Say = Callable[[str], None]
R = TypeVar("R")


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
        try:
            # torchrun gives each process on a machine a number: its GPU.
            device = torch.device(self.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # CPU builds of torch answer with an AssertionError
            raise TrainingError(f"device {self.device}: {str(error).splitlines()[0]}") from error
        return device


def autoencoder(recipe_name: str, folder: Path, run: Run, say: Say) -> bool:
    """Train an autoencoder; False where it was stopped before its end."""
    made = _recipe(recipe_name, AutoencoderRecipe)
    device = run.prepare()
    with processes(device) as rank:
        say = say if rank == 0 else _silent
        fits.check_autoencoder(made, device)
        model = _load(run.init, made.model["class"]) if run.init else None
        return _train(AutoencoderTask(made, _source(folder, made.size_px, say, False), model, device), run, say, rank)


def denoiser(recipe_name: str, folder: Path, autoencoder_folder: Path, run: Run, say: Say) -> bool:
    """Train a denoiser on an autoencoder's latents; False where it was stopped before its end."""
    made = _recipe(recipe_name, DenoiserRecipe)
    device = run.prepare()
    with processes(device) as rank:
        say = say if rank == 0 else _silent
        vae = _load(autoencoder_folder, _class_name(autoencoder_folder))
        source = _source(folder, made.size_px, say, True)
        cache = LatentCache(run.out, source, vae, f"{_data_key(folder)}/{made.size_px}", say, device, rank)
        fits.check_denoiser(made, cache, device)
        model = _load(run.init, made.model["class"]) if run.init else None
        return _train(DenoiserTask(made, cache, model, device), run, say, rank)


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


def _recipe(name: str, kind: type[R]) -> R:
    """A recipe file, or one that comes with the package by its name."""
    bundled = resources.files(__package__).joinpath("recipes")
    known = sorted(item.name.removesuffix(".toml") for item in bundled.iterdir() if item.name.endswith(".toml"))
    if name in known:
        return recipe.parse(bundled.joinpath(f"{name}.toml").read_text(), kind, name)
    if not Path(name).exists():
        raise TrainingError(f"{name}: no such recipe file; recipes that come with latentline: {', '.join(known)}")
    return recipe.load(Path(name), kind)


def _source(folder: Path, size_px: int, say: Say, need_captions: bool) -> Source:
    if (folder / MANIFEST).exists():
        return BuiltData(folder, size_px)
    return FolderData(folder, size_px, say, need_captions)


def _data_key(folder: Path) -> str:
    """Changes when the data do: the manifest, or names, sizes and captions of a folder's files."""
    if (folder / MANIFEST).exists():
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    lines = [f"{path.name} {path.stat().st_size}" for path in sorted(folder.iterdir())]
    lines += [path.read_text() for path in folder.glob("*.jsonl")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _class_name(folder: Path) -> str:
    """The class of an autoencoder folder, read from its configuration."""
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{folder}: no autoencoder in diffusers format: {error!r}") from error
    if name not in AUTOENCODERS:
        raise ModelError(f"{folder}: {name} cannot be used; allowed: {', '.join(AUTOENCODERS)}")
    return str(name)


def _load(folder: Path, class_name: str) -> torch.nn.Module:
    """A model of diffusers in fp32, whatever precision its file has."""
    try:
        model: torch.nn.Module = getattr(diffusers, class_name).from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: no {class_name} in diffusers format: {str(error).splitlines()[0]}") from error
    return model
