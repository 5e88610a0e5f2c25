"""Latents as tokens of 2 x 2 patches, as FLUX.1 and Qwen-Image take them."""

from __future__ import annotations

import torch

PATCH = 2  # latents along the side of a token


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) latents -> (n, h * w / 4, 4c) tokens."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def unpack(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(n, h * w / 4, 4c) tokens -> latents of this shape, (n, c, h, w)."""
    count, channels, height, width = shape
    patches = tokens.view(count, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)
