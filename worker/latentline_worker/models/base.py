"""The interface of a model family, as the engine uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from latentline.jobs import ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable

from .lora import Adapters, Target
from .lora.adapters import Parts

Row = Mapping[str, torch.Tensor]
"""What the network is given of one guidance branch of one image beside its latents: named tensors of any kind, without a
row axis. Gathered for a step, the same names hold (rows, ...) tensors."""


@dataclass(frozen=True)
class Text:
    """A text to encode; equal ones are encoded once."""

    prompt: str
    negative: bool = False
    """A negative prompt. Some families encode an empty one as zeros."""
    adapters: Parts = ()
    """The job's adapters, where they change a text encoder."""


@dataclass(frozen=True)
class Encoded:
    """An encoded text."""

    row: Row
    tokens: tuple[int, int]
    """In the text, and how many the encoder reads; a longer text is cut."""


class Family(Protocol):
    """A loaded latent diffusion model.

    The thread that owns the device calls its methods, those that compute tensors under ``torch.inference_mode``. Task threads
    call ``latent_shape``, ``table`` and ``texts`` as well and read ``info`` and ``revision``, so these must not touch the
    device. A request that a method is given has its width and height filled in.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    """The network's own. Images draw their noise in it."""
    revision: str
    """A digest of the weights: with others, the same request gives another picture."""
    adapters: Adapters | None
    """What jobs may name in ``loras``; None where the worker has no folder of adapters."""

    def lora_target(self) -> Target:
        """What adapters change."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latents of a picture of this size in pixels."""
        ...

    def table(self, request: ResolvedRequest) -> SamplerTable:
        """The sampler's coefficients for the request's scheduler, steps and size.

        Raises:
            CompileError: this model cannot use that scheduler, or not with that many steps; the message says why.
        """
        ...

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        """One text per guidance branch: the conditional one, and for a guided job the unconditional one."""
        ...

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Run the text encoders on a micro-batch; the tensors are on the device."""
        ...

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        """One row per guidance branch, from its text and the request; equal names, shapes and types in each."""
        ...

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        """(c, h, w) standard normal noise that image ``index`` starts from, on the CPU.

        It is drawn as the family's diffusers pipeline draws it; the generator belongs to the image and then draws the
        sampler's noise.
        """
        ...

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        """One network call: (rows, c, h, w), (rows,) and tensors of (rows, ...) by name -> (rows, c, h, w)."""
        ...

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Combine the branches' outputs: (n, c, h, w) float32 twice and (n, 1, 1, 1) guidance scales -> (n, c, h, w)."""
        ...

    def num_pixels(self, latents: torch.Tensor) -> int:
        """Pixels of one image with latents of this shape, (n, c, h, w)."""
        ...

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        """(n, c, h, w) latents -> (n, height, width, 3) uint8 pixels on the device; ``tiled`` saves memory on large images."""
        ...
