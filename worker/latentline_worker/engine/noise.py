"""The noise of one image: its first latents, and what its sampler adds in each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Noise:
    """Draws in the order and the type in which a diffusers pipeline draws, so that a seed gives the same picture as there.

    The generator runs on the CPU whatever the device, so that a seed gives the same picture on every device.

    Args:
        seed: of this image.
        shape: (c, h, w) of its latents.
        dtype: the network's own.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> torch.Tensor:
        """(c * h * w,) float32 standard normal values, on the CPU."""
        return torch.randn((1, *self._shape), generator=self.generator, dtype=self._dtype).float().flatten()

    def skip(self, count: int) -> None:
        """Bring the generator to where it stands after so many draws."""
        for _ in range(count):
            self.draw()


@contextmanager
def draws_undone_on_error(noises: Sequence[Noise]) -> Iterator[None]:
    """Put the generators back where they stood if the block raises: a step that is tried again draws the same noise."""
    states = [noise.generator.get_state() for noise in noises]
    try:
        yield
    except BaseException:
        for noise, state in zip(noises, states, strict=True):
            noise.generator.set_state(state)
        raise
