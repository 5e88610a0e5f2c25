"""Number formats of training.

bf16 makes a step faster on CPUs that have instructions for it (``avx512_bf16`` in ``/proc/cpuinfo``), with one
exception: the gradient of torch's fused attention is so slow in bf16 that nothing is gained in all (torch 2.13 on a CPU). In bf16 on
a CPU, attention is therefore computed from matrix products and a softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import AttnProcessor


def dtype_of(precision: str) -> torch.dtype:
    """fp32 or bf16 as torch calls it."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def prepare(model: torch.nn.Module, precision: str) -> None:
    """Give the model the attention that suits training in this precision on the device where it lies."""
    choose: Callable[[AttnProcessor], None] | None = getattr(model, "set_attn_processor", None)
    if precision == "bf16" and next(model.parameters()).device.type == "cpu" and choose:
        choose(AttnProcessor())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype_of(precision), enabled=precision != "fp32")
