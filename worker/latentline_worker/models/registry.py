"""Chooses the family that loads a model, and the id under which jobs request it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from latentline.errors import ModelError

from . import bundled_model, folder, sources
from .base import Family
from .flux import Flux
from .lora import Adapters
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


def load(source: str, device: torch.device, dtype: torch.dtype, *, config: str | None = None, model_id: str | None = None) -> Family:
    """Load the bundled model by its id, a diffusers-format folder, a single ``.safetensors`` file, or a hub id.

    Everything is checked, and read into host memory, before the device is touched.

    Args:
        source: as :func:`.sources.find` takes it.
        config: of a single file: where its configurations and tokenizers are.
        model_id: under which jobs request it; by default the bundled model's, the folder's or file's name, or the hub id.

    Raises:
        ModelError: the model is missing or broken, or of no family that is known; the message names the file or the field.
    """
    # diffusers warns of a prompt that it has cut with the text that was cut: prompts do not belong into logs.
    diffusers.utils.logging.set_verbosity_error()
    if source == bundled_model.MODEL_ID:
        return bundled_model.load(device, dtype)
    files = sources.find(source, config)
    name = files.index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"{files.folder / folder.INDEX}: _class_name: got {name!r}; allowed: {', '.join(FAMILIES)}")
    family: Family = FAMILIES[name].load(files, model_id or files.name, device, dtype)
    return family


def add_adapters(family: Family, path: Path, slots: int, rank: int) -> None:
    """Let jobs name the LoRA adapters of a folder; :class:`~latentline_worker.models.lora.Adapters` tells of the arguments.

    Raises:
        ModelError: there is no such folder.
    """
    family.adapters = Adapters(path, family.lora_target(), slots, rank)
    family.info = family.info.model_copy(update={"loras": family.adapters.names})


def check_adapters(source: str, path: Path, rank: int) -> dict[str, str | None]:
    """What a worker of a model would say of each adapter in a folder: None where it can use it, else why not.

    Raises:
        ModelError: the model cannot be loaded.
    """
    family = load(source, torch.device("cpu"), torch.float32)
    adapters = Adapters(path, family.lora_target(), 1, rank)
    return dict(sorted({**dict.fromkeys(adapters.names), **adapters.refused}.items()))
