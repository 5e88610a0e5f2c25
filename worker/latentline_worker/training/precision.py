"""Number formats of the forward pass.

bf16 halves the time of a step on CPUs with its instructions (``avx512_bf16`` in ``/proc/cpuinfo``), with one exception:
the gradient of torch's fused attention takes longer in bf16 than everything else in a step together (torch 2.13, CPU).
Attention is therefore computed there from its parts. The values are the same.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import AttnProcessor


def prepare(model: torch.nn.Module, precision: str) -> None:
    """Give the model the attention that suits training in this precision on the device where it lies."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if precision == "bf16" and on_cpu and hasattr(model, "set_attn_processor"):
        model.set_attn_processor(AttnProcessor())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
