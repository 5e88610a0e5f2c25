"""Latents -> pixels in micro-batches, between denoise steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from latentline_worker.models.base import Family

from .network import device_lost, out_of_memory

log = logging.getLogger(__name__)

# Images with more pixels are decoded tile by tile: the activations of a whole 2048 px image take over 10 GB in half
# precision. By size and not by free memory, so that the same job gives the same picture on every machine.
TILE_ABOVE_PIXELS = 1024 * 1024


@dataclass(eq=False)
class Decoding:
    """One request's images on their way to pixels."""

    latents: torch.Tensor  # (images, c, h, w)
    tiled: bool
    done: Callable[[torch.Tensor | Exception], None]
    pixels: dict[int, torch.Tensor] = field(default_factory=dict)  # by the image's place
    failed: bool = False


class Decoder:
    """Decodes images of any jobs together. Used by the thread that owns the device.

    Args:
        family: the loaded model.
        max_batch: images of one call; 1 in the reproducible mode.
    """

    def __init__(self, family: Family, max_batch: int) -> None:
        self._family = family
        self._max_batch = max_batch
        self._queue: deque[tuple[Decoding, int]] = deque()  # one entry per image

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    def submit(self, latents: torch.Tensor, done: Callable[[torch.Tensor | Exception], None]) -> None:
        """(images, c, h, w) latents; ``done`` gets (images, height, width, 3) uint8 pixels on the device, or an error."""
        decoding = Decoding(latents, self._family.num_pixels(latents) > TILE_ABOVE_PIXELS, done)
        self._queue.extend((decoding, i) for i in range(len(latents)))

    def decode_now(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode a few images at once, for warm-up."""
        outcomes: list[torch.Tensor | Exception] = []
        self.submit(latents, outcomes.append)
        while self.pending:
            self.decode_some()
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0]

    def decode_some(self) -> None:
        """One micro-batch: images of the first one's shape, at most ``max_batch``."""
        while self._queue and self._queue[0][0].failed:
            self._queue.popleft()
        batch: list[tuple[Decoding, int]] = []
        while self._queue and len(batch) < self._max_batch:
            decoding, first = self._queue[0][0], batch[0][0] if batch else self._queue[0][0]
            if decoding.latents.shape[1:] != first.latents.shape[1:] or decoding.tiled != first.tiled:
                break
            batch.append(self._queue.popleft())
        if batch:
            self._run(batch)

    def abandon(self, error: Exception) -> None:
        """Decode nothing more; whoever waits gets this error."""
        while self._queue:
            decoding, _ = self._queue.popleft()
            if not decoding.failed:
                decoding.failed = True
                decoding.done(error)

    def _run(self, batch: list[tuple[Decoding, int]]) -> None:
        tiled = batch[0][0].tiled
        try:
            pixels = self._decode(torch.stack([decoding.latents[i] for decoding, i in batch]), tiled)
        except Exception as error:
            if device_lost(error):
                raise
            if len(batch) == 1:
                decoding = batch[0][0]
                if out_of_memory(error) and not tiled:
                    log.warning("out of memory in a decode: trying it in tiles")
                    decoding.tiled = True
                    self._queue.appendleft(batch[0])
                elif not decoding.failed:
                    decoding.failed = True
                    decoding.done(error)
                return
            pixels = None
        if pixels is None:  # outside of the except block, whose error would keep tensors alive; only the guilty fail
            for one in batch:
                self._run([one])
            return
        for (decoding, i), image in zip(batch, pixels, strict=True):
            decoding.pixels[i] = image
            if len(decoding.pixels) == len(decoding.latents) and not decoding.failed:
                decoding.done(self._whole(decoding))

    @staticmethod
    def _whole(decoding: Decoding) -> torch.Tensor | Exception:
        """All images of a request in one, or the error, which is this request's alone."""
        try:
            return torch.stack([decoding.pixels[k] for k in range(len(decoding.latents))])
        except Exception as error:
            return error

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor, tiled: bool) -> torch.Tensor:
        return self._family.decode(latents, tiled=tiled)
