"""LoRA adapters with random updates."""

from __future__ import annotations

import re
from typing import Any

import torch

Updates = dict[str, torch.Tensor]


def updates_of(pipeline: Any, part: str, ends: str, rank: int, seed: int) -> Updates:
    """Random updates in peft's format for the layers of a part whose names match."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in getattr(pipeline, part).named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and re.search(rf"({ends})$", name):
            weight = layer.weight
            one = (1, 1) if isinstance(layer, torch.nn.Conv2d) else ()
            made[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
            made[f"{part}.{name}.lora_B.weight"] = torch.randn(len(weight), rank, *one, generator=generator) * 0.3
    assert made, f"no layer of {part} matches {ends}"
    return made
