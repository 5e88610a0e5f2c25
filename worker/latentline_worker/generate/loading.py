"""Loads the model onto its device and makes the engine for it."""

from __future__ import annotations

import torch

from latentline_worker.engine.engine import Engine
from latentline_worker.models import registry
from latentline_worker.models.base import Family
from latentline_worker.settings import WorkerSettings


def load_model(settings: WorkerSettings) -> Family:
    """Load the configured model onto the one visible device, or onto the CPU.

    Raises:
        ModelError: it is missing, damaged or of a kind that is not served, or the folder of adapters is missing; the message names the
            file or the field.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.dtype if settings.dtype != "auto" else _own_type(device)
    family = registry.load(settings.model, device, getattr(torch, name), config=settings.config)
    if settings.lora_dir:
        registry.add_adapters(family, settings.lora_dir, settings.lora_slots, settings.lora_rank)
    return family


def _own_type(device: torch.device) -> str:
    """float32 on a CPU; on a GPU bfloat16 where it computes in it, since float16 may overflow, and float16 elsewhere."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def make_engine(settings: WorkerSettings, family: Family) -> Engine:
    """An engine with these settings: memory and step costs are measured, its thread is not started.

    Raises:
        OutOfMemory: not even one row of the model's own size fits.
        ConfigurationError: the fixed rows of the reproducible mode do not fit into memory.
    """
    engine = Engine(
        [family],
        max_rows=settings.max_rows,
        decode_batch=settings.decode_batch,
        fixed_rows=settings.reproducible_rows,
        checkpoint_s=settings.checkpoint_s,
        memory_limit_bytes=settings.memory_limit_mb and settings.memory_limit_mb << 20,
    )
    engine.warm_up()
    return engine
