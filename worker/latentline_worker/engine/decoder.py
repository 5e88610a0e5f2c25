"""Latents -> pixels in micro-batches, between denoise steps."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from latentline_worker.models.base import Family

from .failures import out_of_memory, raise_if_lost, run_in_parts

log = logging.getLogger(__name__)

# Images with more pixels are decoded in tiles: the activations of a whole 2048 px image take over 10 GB in half
# precision. Decided by size and not by free memory, so that the same job gives the same picture on every machine. The
# exception, outside the reproducible mode: a smaller image for which memory runs out is decoded in tiles instead of failing.
TILE_ABOVE_PIXELS = 1024 * 1024


@dataclass(eq=False)
class Decoding:
    """The images of one request while they are decoded."""

    family: Family
    latents: torch.Tensor  # (images, c, h, w)
    tiled: bool
    finish: Callable[[torch.Tensor | Exception], None]
    pixels: dict[int, torch.Tensor] = field(default_factory=dict)  # by the image's place
    failed: bool = False

    @property
    def alike(self) -> tuple[str, torch.Size, bool]:
        """Images for which this is equal can be decoded in one call."""
        return self.family.info.id, self.latents.shape[1:], self.tiled

    @property
    def complete(self) -> bool:
        return len(self.pixels) == len(self.latents) and not self.failed


Image = tuple[Decoding, int]  # an image of a request, by its place


class Decoder:
    """Decodes images of any jobs together. Used by the thread that owns the device.

    Args:
        max_batch: images of one call; 1 in the reproducible mode.
        tiles_on_shortage: decode an image in tiles if memory runs out. It then looks slightly different (34.6 dB on a tiny
            model), so in the reproducible mode such a job fails instead.
        fits: how many images of a model's id and a number of latents fit into memory in one call.
    """

    def __init__(
        self, max_batch: int, tiles_on_shortage: bool = True, fits: Callable[[str, int], int] = lambda model, num_latents: sys.maxsize
    ) -> None:
        self.max_batch = max_batch
        self._fits = fits
        self._tiles_on_shortage = tiles_on_shortage
        self._queue: deque[Image] = deque()

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    @property
    def num_bytes(self) -> int:
        """Of the latents that wait, and of the pixels of images whose request has others that wait."""
        waiting = dict.fromkeys(decoding for decoding, _ in self._queue)
        return sum(one.latents.nbytes + sum(pixels.nbytes for pixels in one.pixels.values()) for one in waiting)

    def submit(self, family: Family, latents: torch.Tensor, finish: Callable[[torch.Tensor | Exception], None]) -> None:
        """Decode (images, c, h, w) latents in one of the next calls of :meth:`decode_some`.

        Args:
            family: the request's model.
            latents: of one request.
            finish: called once, with (images, height, width, 3) uint8 pixels on the device or with the error.
        """
        decoding = Decoding(family, latents, family.num_pixels(latents) > TILE_ABOVE_PIXELS, finish)
        self._queue.extend((decoding, i) for i in range(len(latents)))

    def decode_now(self, family: Family, latents: torch.Tensor) -> torch.Tensor:
        """Decode a few images at once, for warm-up."""
        outcomes: list[torch.Tensor | Exception] = []
        self.submit(family, latents, outcomes.append)
        while self.pending:
            self.decode_some()
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0]

    def decode_some(self) -> None:
        """Decode one micro-batch: at most ``max_batch`` images, all of the first one's model, shape and tiling."""
        if not self._queue:
            return
        batch: list[Image] = []
        head = self._queue[0][0]
        most = min(self.max_batch, self._fits(head.family.info.id, head.latents[0].numel()))
        while self._queue and len(batch) < most:
            if self._queue[0][0].alike != head.alike:
                break
            batch.append(self._queue.popleft())
        retry: list[Image] = []

        def failed(image: Image, error: Exception) -> None:
            if self._tiles_on_shortage and out_of_memory(error) and not image[0].tiled:
                retry.append(image)
            else:
                self._fail(image[0], error)

        run_in_parts(batch, self._decode, failed, device=batch[0][0].family.device)
        for decoding in dict.fromkeys(decoding for decoding, _ in batch):
            if decoding.complete:
                decoding.finish(_joined(decoding))
        # After the batch, so that all parts of it run with the tiling with which it was formed.
        for decoding, i in reversed(retry):
            if decoding.failed:
                continue
            log.warning("out of memory in a decode: trying it in tiles")
            decoding.tiled = True
            self._queue.appendleft((decoding, i))

    @torch.inference_mode()
    def _decode(self, images: Sequence[Image]) -> None:
        latents = torch.stack([decoding.latents[i] for decoding, i in images])
        decoded = images[0][0].family.decode(latents, tiled=images[0][0].tiled)
        for (decoding, i), pixels in zip(images, decoded, strict=True):
            decoding.pixels[i] = pixels

    def _fail(self, decoding: Decoding, error: Exception) -> None:
        """One image that cannot be decoded fails its request, once; the request's other images are dropped."""
        if not decoding.failed:
            decoding.failed = True
            self._queue = deque(image for image in self._queue if image[0] is not decoding)
            decoding.finish(error)


def _joined(decoding: Decoding) -> torch.Tensor | Exception:
    """All images of a request in one tensor, or the error: no memory for it is this request's failure alone."""
    try:
        return torch.stack([decoding.pixels[i] for i in range(len(decoding.latents))])
    except Exception as error:
        raise_if_lost(error)
        return error
