"""The interface of a model family, as the engine uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from latentline.jobs import ModelInfo


class Family(Protocol):
    """A loaded latent diffusion model.

    The thread that owns the device calls its methods, those that compute tensors under ``torch.inference_mode``. Task threads
    call ``latent_shape`` as well and read ``info`` and ``scheduler_config``, so these must not touch the device.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    scheduler_config: Mapping[str, Any]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latents of a picture of this size in pixels."""
        ...

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """(len(texts), tokens, width) prompt embeds for cross-attention, on the device."""
        ...

    def count_tokens(self, text: str) -> tuple[int, int]:
        """(tokens in the text, tokens that the encoder reads at most); a longer text is cut."""
        ...

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """One network call: (rows, c, h, w), (rows,), (rows, tokens, width) -> (rows, c, h, w)."""
        ...

    def num_pixels(self, latents: torch.Tensor) -> int:
        """Pixels of one image with latents of this shape, (n, c, h, w)."""
        ...

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        """(n, c, h, w) latents -> (n, height, width, 3) uint8 pixels on the device; ``tiled`` saves memory on large images."""
        ...
