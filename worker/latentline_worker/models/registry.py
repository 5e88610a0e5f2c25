"""Chooses the family that loads a model, and the id under which jobs request it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentline.errors import ModelError

from . import bundled_model, folder
from .base import Family
from .flux import Flux
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL

# By the pipeline's class in model_index.json. A new family is one file and a line here.
FAMILIES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}


def load(source: str, device: torch.device, dtype: torch.dtype) -> Family:
    """Load the bundled model by its id, a diffusers-format directory, or a hub id.

    A directory is served under its own name, a hub id under itself.

    Raises:
        ModelError: the model is missing or broken, or of no family that is known; the message names the file.
    """
    # diffusers warns of a prompt that it has cut with the text that was cut: prompts do not belong into logs.
    diffusers.utils.logging.set_verbosity_error()
    if source == bundled_model.MODEL_ID:
        return bundled_model.load(device, dtype)
    path = Path(source)
    if path.exists() or source.startswith(("/", ".", "~")):
        path = path.expanduser().resolve()
        if not path.is_dir():
            raise ModelError(f"{path}: no such model folder")
        return _loader(str(path), folder.read_index(path))(str(path), path.name, device, dtype)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelError(f"{source!r} is neither {bundled_model.MODEL_ID!r}, a folder, nor a hub id")
    return _loader(source, _hub_index(source))(source, source, device, dtype)


def _loader(source: str, index: dict[str, Any]) -> Callable[[str, str, torch.device, torch.dtype], Family]:
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ModelError(f"{source}: its pipeline is {name!r}; allowed: {', '.join(FAMILIES)}")
    loader: Callable[[str, str, torch.device, torch.dtype], Family] = FAMILIES[name].load
    return loader


def _hub_index(source: str) -> dict[str, Any]:
    try:
        return dict(diffusers.DiffusionPipeline.load_config(source))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no model of this name can be loaded: {str(error).splitlines()[0]}") from error
