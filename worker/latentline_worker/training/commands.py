"""What ``latentline train`` does: recipe, data, memory check, then the loop. Each command resumes by itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch

from latentline.errors import ModelError

from . import memory, recipe
from .autoencoder import AutoencoderTask, make_model, reconstruction_loss
from .build import build
from .denoiser import DenoiserTask
from .errors import TrainingError
from .folders import FolderData
from .latents import LatentCache
from .loop import Task, Training
from .manifest import MANIFEST, find_leaks
from .recipe import AutoencoderRecipe, DenoiserRecipe
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


def autoencoder(recipe_name: str, folder: Path, out: Path, init: Path | None, start_step: int, threads: int | None, say: Say) -> bool:
    """Train an autoencoder; False where it was stopped before its end."""
    made = _recipe(recipe_name, AutoencoderRecipe)
    with _threads(threads):
        _check_autoencoder_memory(made)
        model = _load(init, made.model["class"]) if init else None
        return _run(AutoencoderTask(made, _source(folder, made.size_px, say, False), model), out, start_step, say)


def denoiser(
    recipe_name: str, folder: Path, autoencoder_folder: Path, out: Path, init: Path | None, start_step: int, threads: int | None, say: Say
) -> bool:
    """Train a denoiser on an autoencoder's latents; False where it was stopped before its end."""
    made = _recipe(recipe_name, DenoiserRecipe)
    with _threads(threads):
        vae = _load(autoencoder_folder, _class_name(autoencoder_folder))
        source = _source(folder, made.size_px, say, True)
        cache = LatentCache(out, source, vae, f"{_data_key(folder)}/{made.size_px}", say)
        _check_denoiser(made, cache, source)
        model = _load(init, made.model["class"]) if init else None
        return _run(DenoiserTask(made, cache, model), out, start_step, say)


def _run(task: Task, out: Path, start_step: int, say: Say) -> bool:
    training = Training(task, out, say)
    if training.resume():
        say(f"going on at step {training.step} of {training.schedule.steps}")
    elif start_step:
        training.begin_at(start_step)
    training.stop_on_signals()
    done = training.run()
    say(f"the model is in {out}" if done else f"stopped at step {training.step}: the same command goes on from there")
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
        name = diffusers.ConfigMixin.load_config(folder)["_class_name"]
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{folder}: no autoencoder in diffusers format: {str(error).splitlines()[0]}") from error
    return str(name)


def _load(folder: Path, class_name: str) -> torch.nn.Module:
    """A model of diffusers in fp32, whatever precision its file has."""
    try:
        model: torch.nn.Module = getattr(diffusers, class_name).from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: no {class_name} in diffusers format: {str(error).splitlines()[0]}") from error
    return model


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_autoencoder_memory(made: AutoencoderRecipe) -> None:
    shape = (made.schedule.batch, 3, made.crop_px, made.crop_px)

    def run() -> torch.Tensor:
        model: Any = make_model(made.model, 0)
        x = torch.zeros(shape)
        encoded = model.encode(x)
        return reconstruction_loss(model.decode(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).sample, x)

    with torch.device("meta"):
        weights = memory.weights_bytes(make_model(made.model, 0), made.schedule.ema_decay > 0)
    memory.check(weights + memory.activation_bytes(run), "the autoencoder's training", memory.free_bytes())


def _check_denoiser(made: DenoiserRecipe, cache: LatentCache, source: Source) -> None:
    """The model takes this autoencoder's latents and this text encoder's states, and it fits into memory."""
    z = cache.encode(torch.zeros(1, 3, made.size_px, made.size_px))
    batch, tokens, width = made.schedule.batch, *cache.empty.shape

    def run() -> torch.Tensor:
        model: Any = make_model(made.model, 0)
        loss: torch.Tensor = model(torch.zeros(batch, *z.shape[1:]), torch.zeros(batch), torch.zeros(batch, tokens, width)).sample.sum()
        return loss

    with torch.device("meta"):
        model: Any = make_model(made.model, 0)
    config = model.config
    if (config.in_channels, config.out_channels, config.sample_size) != (z.shape[1], z.shape[1], z.shape[2]):
        raise TrainingError(
            f"model: in_channels, out_channels and sample_size must be {z.shape[1]}, {z.shape[1]}, {z.shape[2]} for this autoencoder"
        )
    if config.cross_attention_dim != width:
        raise TrainingError(f"model.cross_attention_dim: got {config.cross_attention_dim}; the text encoder's states have {width}")
    needed = memory.weights_bytes(model, made.schedule.ema_decay > 0) + memory.activation_bytes(run)
    needed += source.num_items * made.compositions * z[0].numel() * 2
    memory.check(needed, "the denoiser's training", memory.free_bytes())
