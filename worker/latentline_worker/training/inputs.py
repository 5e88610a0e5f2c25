"""What a training is given: recipes by name, data sets and folders, models in diffusers format, a device."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TypeVar

import diffusers
import torch

from latentline.errors import ModelError

from . import recipe
from .errors import TrainingError
from .folders import FolderData
from .manifest import MANIFEST
from .recipe import AUTOENCODERS
from .sources import BuiltData, Source

Say = Callable[[str], None]
R = TypeVar("R")


def find_device(name: str | None) -> torch.device:
    """A device of torch by its name; a GPU where there is one, for None.

    Raises:
        TrainingError: torch has no such device.
    """
    try:
        # torchrun gives each process on a machine a number: its GPU.
        device = torch.device(name or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # CPU builds of torch answer with an AssertionError
        raise TrainingError(f"device {name}: {str(error).splitlines()[0]}") from error
    return device


def find_recipe(name: str, kind: type[R]) -> R:
    """A recipe file, or one that comes with the package by its name.

    Raises:
        TrainingError: there is no such recipe, or it is not one of this kind; the message names the key.
    """
    bundled = resources.files(__package__).joinpath("recipes")
    known = sorted(item.name.removesuffix(".toml") for item in bundled.iterdir() if item.name.endswith(".toml"))
    if name in known:
        return recipe.parse(bundled.joinpath(f"{name}.toml").read_text(), kind, name)
    if not Path(name).exists():
        raise TrainingError(f"{name}: no such recipe file; recipes that come with latentline: {', '.join(known)}")
    return recipe.load(Path(name), kind)


def open_source(folder: Path, size_px: int, say: Say, need_captions: bool) -> Source:
    """A built data set, or a folder of pictures; raises as these do."""
    if (folder / MANIFEST).exists():
        return BuiltData(folder, size_px)
    return FolderData(folder, size_px, say, need_captions)


def data_key(folder: Path) -> str:
    """Changes when the data do: the manifest, or names, sizes and captions of a folder's files."""
    if (folder / MANIFEST).exists():
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    lines = [f"{path.name} {path.stat().st_size}" for path in sorted(folder.iterdir())]
    lines += [path.read_text() for path in folder.glob("*.jsonl")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def class_name(folder: Path) -> str:
    """The class of an autoencoder folder, read from its configuration."""
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{folder}: no autoencoder in diffusers format: {error!r}") from error
    if name not in AUTOENCODERS:
        raise ModelError(f"{folder}: {name} cannot be used; allowed: {', '.join(AUTOENCODERS)}")
    return str(name)


def load_model(folder: Path, class_name: str) -> torch.nn.Module:
    """A model of diffusers in fp32, whatever precision its file has."""
    try:
        model: torch.nn.Module = getattr(diffusers, class_name).from_pretrained(folder, use_safetensors=True, local_files_only=True).float()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: no {class_name} in diffusers format: {str(error).splitlines()[0]}") from error
    return model
