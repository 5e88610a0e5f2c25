"""What the engine and the delivery need of a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from latentline.jobs import ModelInfo


class Family(Protocol):
    """A loaded latent diffusion model. Methods are called from one thread each, under ``torch.no_grad``."""

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    scheduler_config: Mapping[str, Any]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latents of a picture of this size in pixels."""
        ...

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """(len(texts), tokens, width) states for cross-attention, on the device."""
        ...

    def count_tokens(self, text: str) -> tuple[int, int]:
        """(tokens in the text, tokens that the encoder reads): the rest of a longer text is cut."""
        ...

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """One network call: (rows, c, h, w), (rows,), (rows, tokens, width) -> (rows, c, h, w)."""
        ...

    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """(n, c, h, w) latents -> (n, height, width, 3) pixels in 0..255."""
        ...
