"""Chooses the family that loads a model, and the id under which jobs request it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from latentline.errors import ModelError

from . import bundled_model
from .base import Family
from .sd import StableDiffusion


def load(source: str, device: torch.device, dtype: torch.dtype) -> Family:
    """Load the bundled model by its id, a diffusers-format directory, or a hub id.

    A directory is served under its own name, a hub id under itself.

    Raises:
        ModelError: the model is missing or broken; the message names the file.
    """
    if source == bundled_model.MODEL_ID:
        return bundled_model.load(device, dtype)
    path = Path(source)
    if path.exists() or source.startswith(("/", ".", "~")):
        path = path.expanduser().resolve()
        if not path.is_dir():
            raise ModelError(f"{path}: no such model folder")
        return StableDiffusion.load(str(path), path.name, device, dtype)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelError(f"{source!r} is neither {bundled_model.MODEL_ID!r}, a folder, nor a hub id")
    return StableDiffusion.load(source, source, device, dtype)
