"""Chooses the family that loads a model, and the id under which jobs request it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentline.errors import InvalidRequest, ModelError
from latentline.jobs import JobRequest, ModelInfo, resolve
from latentline_worker.samplers import CompileError

from . import authors, bundled_model, folder, sources
from .base import Family
from .catalog import ModelEntry
from .flux import Flux
from .lora import Adapters, Folder, Source
from .qwen_image import QwenImage
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .z_image import ZImage

# By the pipeline's class in model_index.json. A new family is one file and a line here.
FAMILIES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
}


def load(source: str, device: torch.device, dtype: torch.dtype, *, config: str | None = None) -> Family:
    """Load a model under its own name, with its own defaults: an entry that says no more, see :func:`load_entry`."""
    return load_entry(ModelEntry(source=source, config=config), device, dtype)


def load_entry(entry: ModelEntry, device: torch.device, dtype: torch.dtype) -> Family:
    """Load the bundled model by its id, a diffusers-format folder, a single ``.safetensors`` file, or a hub id.

    Everything is checked, and read into host memory, before the device is touched.

    Args:
        entry: what to load and how to serve it; its own ``dtype`` is the caller's affair.

    Raises:
        ModelError: the model is missing or broken, of no family that is known, or cannot do what its defaults say; the message
            names the file or the field.
    """
    # diffusers warns of a prompt that it has cut with the text that was cut: prompts do not belong into logs.
    diffusers.utils.logging.set_verbosity_error()
    if entry.lora_dir and not entry.lora_dir.is_dir():
        raise ModelError(f"lora_dir: got {str(entry.lora_dir)!r}; allowed: a folder that exists")
    family: Any
    if entry.source == bundled_model.MODEL_ID:
        if entry.config or entry.revision:
            raise ModelError(f"config and revision: got {entry.config!r} and {entry.revision!r}; allowed: neither for {entry.source}")
        family = bundled_model.load(device, dtype)
    else:
        files = sources.find(entry.location, entry.config)
        name = files.index.get("_class_name")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ModelError(f"{files.folder / folder.INDEX}: _class_name: got {name!r}; allowed: {', '.join(FAMILIES)}")
        family = FAMILIES[name].load(files, entry.name, device, dtype)
    advice = authors.advice(entry.source)
    if advice:
        family.scheduler_config = {**family.scheduler_config, **advice.scheduler_config}
    family.info = _served(family, entry, advice)
    return family  # type: ignore[no-any-return]


def _served(family: Family, entry: ModelEntry, advice: authors.Advice | None) -> ModelInfo:
    """What the model announces: the family's own, then what its authors say, then what the entry says."""
    said: dict[str, Any] = {"id": entry.name}
    if advice:
        names = ("scheduler", "num_inference_steps", "guidance_scale")
        said |= {f"default_{name}": getattr(advice, name) for name in names}
    said |= {f"default_{name}": value for name, value in entry.defaults.model_dump(exclude_none=True).items()}
    info = family.info.model_copy(update=said)
    try:
        family.table(resolve(JobRequest.parse({"model": info.id, "prompt": "a", "scheduler": said.get("default_scheduler")}), info).request)
    except InvalidRequest as error:
        field = "id" if error.field == "model" else f"{info.id}: defaults.{error.field}"
        raise ModelError(f"{field}: got {error.value!r}; allowed: {error.allowed}") from None
    except CompileError as error:
        given = f"{info.default_scheduler!r} with {info.default_num_inference_steps} steps"
        raise ModelError(f"{info.id}: defaults.scheduler: got {given}; allowed: what it can do: {error}") from None
    return info


def add_adapters(family: Family, sources: Sequence[Source], slots: int, rank: int) -> None:
    """Let jobs name the LoRA adapters of these sources; :class:`~latentline_worker.models.lora.Adapters` tells of the arguments.

    Raises:
        LatentlineError: a source cannot be listed.
    """
    family.adapters = Adapters(sources, family.lora_target(), slots, rank)
    family.info = family.info.model_copy(update={"loras": family.adapters.names})


def check_adapters(source: str, path: Path, rank: int) -> dict[str, str | None]:
    """What a worker of a model would say of each adapter in a folder: None where it can use it, else why not.

    Raises:
        ModelError: the model cannot be loaded.
    """
    family = load(source, torch.device("cpu"), torch.float32)
    adapters = Adapters([Folder(path)], family.lora_target(), 1, rank)
    return dict(sorted({**dict.fromkeys(adapters.names), **adapters.refused}.items()))
