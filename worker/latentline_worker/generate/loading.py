"""Loads the models onto their device and makes the engine for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentline_worker.engine.engine import Engine
from latentline_worker.models import catalog, registry
from latentline_worker.models.base import Family
from latentline_worker.models.catalog import ModelEntry
from latentline_worker.settings import WorkerSettings


def entries_of(settings: WorkerSettings) -> tuple[ModelEntry, ...]:
    """What the settings say is served: the file's models, or the one model.

    Raises:
        ConfigurationError: the file cannot be read, or says something that has no meaning.
    """
    if settings.models is not None:
        return catalog.read(settings.models)
    return (ModelEntry(source=settings.model, config=settings.config),)


def load_models(settings: WorkerSettings) -> list[Family]:
    """Load the configured models onto the one visible device, or onto the CPU.

    Raises:
        ConfigurationError: the file that names them cannot be read, or says something that has no meaning.
        ModelError: one is missing, damaged or of a kind that is not served; the message names the file or the field.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_load(entry, settings, device) for entry in entries_of(settings)]


def _load(entry: ModelEntry, settings: WorkerSettings, device: torch.device) -> Family:
    name = entry.dtype or settings.dtype
    family = registry.load_entry(entry, device, getattr(torch, name if name != "auto" else _own_type(device)))
    if lora_dir := entry.lora_dir or settings.lora_dir:
        registry.add_adapters(family, lora_dir, settings.lora_slots, settings.lora_rank)
    return family


def _own_type(device: torch.device) -> str:
    """float32 on a CPU; on a GPU bfloat16 where it computes in it, since float16 may overflow, and float16 elsewhere."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def make_engine(settings: WorkerSettings, families: Sequence[Family]) -> Engine:
    """An engine with these settings: memory and step costs are measured, its thread is not started.

    Raises:
        OutOfMemory: not even one row of a model's own size fits.
        ConfigurationError: the fixed rows of the reproducible mode do not fit into memory.
    """
    engine = Engine(
        families,
        max_rows=settings.max_rows,
        decode_batch=settings.decode_batch,
        fixed_rows=settings.reproducible_rows,
        checkpoint_s=settings.checkpoint_s,
        memory_limit_bytes=settings.memory_limit_mb and settings.memory_limit_mb << 20,
    )
    engine.warm_up()
    return engine
