"""One budget of memory for a device, and what each part of a lane takes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from latentline.errors import OutOfMemory
from latentline_worker.models.base import Family
from latentline_worker.samplers import MAX_ORDER

from .conditioning import LEAST_ENTRIES
from .decoder import TILE_ABOVE_PIXELS
from .footprint import Footprint, peak_bytes
from .free_memory import free_bytes
from .request import LaneKey, Request
from .rows import MAX_BRANCHES, num_bytes

log = logging.getLogger(__name__)

USABLE = 0.9  # of what is free after loading: allocators fragment, and libraries allocate workspaces
STEP_SHARE = 0.75  # of the room, at most, for one step's rows or one decode where more than one fits; the rest is for slots
GRAPH_SHARE = 0.25  # of the room, at most, for the forward of the largest captured graph: its memory serves nothing else
TEXT_SHARE = 0.02  # of what is usable, for cached texts, and again for the rows of jobs that wait
MARGIN = 1.25  # on measured activations: workspaces inside kernels are not measured
# Float32 copies of an image's latents that a step holds for each row around the forward: 9 of the history, and temporaries of
# guidance and of the samplers' update.
COPIES = 16
HISTORY = 2 * MAX_ORDER + 1


class Memory:
    """The bytes that a device has for the engine, and what slots, rows and decodes of each size take of them.

    The budget is ``usable``: what there is beside the weights. Adapters and the cache of texts come off first. The rest, ``room``,
    holds the slots of all lanes and, one at a time, a step's forward, a decode, or a micro-batch of texts. :class:`~.lanes.Lanes`
    keeps the account.

    Args:
        device: of the loaded models.
        limit_bytes: what the engine may use beside the weights; by default ``USABLE`` of what is free after loading.
        adapter_bytes: what the banks of adapters take now; they exist already when the free memory is read.
        texts: of one micro-batch.
    """

    def __init__(
        self, device: torch.device, limit_bytes: int | None = None, adapter_bytes: Callable[[], int] = lambda: 0, texts: int = 1
    ) -> None:
        self._device, self._adapter_bytes, self._texts = device, adapter_bytes, texts
        self.usable = limit_bytes if limit_bytes is not None else int(free_bytes(device) * USABLE) + adapter_bytes()
        self.footprints: dict[str, Footprint] = {}  # by model; before a model's warm-up its steps count as nothing

    @property
    def room(self) -> int:
        """Bytes for slots, and for one step or decode at a time."""
        least = LEAST_ENTRIES * max((found.text_row for found in self.footprints.values()), default=0)
        return max(0, self.usable - 2 * max(self.text_bytes, least) - self._adapter_bytes())

    @property
    def text_bytes(self) -> int:
        """What cached texts may take, and again what the rows of jobs may that wait for a slot."""
        return int(self.usable * TEXT_SHARE)

    def measure(
        self,
        family: Family,
        key: LaneKey,
        num_pixels: int,
        *,
        denoise: Callable[[], object],
        decode: Callable[[], object],
        encode: Callable[[], object],
    ) -> None:
        """Measure a model's footprint with one row's forward, one image's decode and one text, at a lane's shape.

        Args:
            family: the model.
            key: of the lane.
            num_pixels: of one image of that shape.
        """
        peaks = []
        for call in (denoise, decode, encode):
            with peak_bytes(self._device) as peak:
                call()
            peaks.append(MARGIN * peak())
        row, image, text = peaks
        self.footprints[key.model] = Footprint(family, key, row, image, num_pixels, text * self._texts)
        log.info(
            "memory: %d MB usable, %d MB of them adapters; a row of %s takes %.1f MB, a decode %.1f MB, a slot %.1f MB",
            self.usable >> 20, self._adapter_bytes() >> 20, key.model, row / 2**20, image / 2**20, self.slot_bytes(key) / 2**20,
        )  # fmt: skip

    @contextmanager
    def charged(self) -> Iterator[None]:
        """What the block takes from the device and keeps, such as captured graphs, is usable no more."""
        before = free_bytes(self._device) if self._device.type == "cuda" else 0
        yield
        if self._device.type == "cuda":
            taken = max(0, before - free_bytes(self._device))
            self.usable = max(0, self.usable - taken)
            log.info("memory: captured graphs take %d MB", taken >> 20)

    def slot_bytes(self, key: LaneKey) -> int:
        """One image between steps: history in float32, the rows of its guidance branches, the place of its adapters."""
        return HISTORY * key.num_latents * 4 + MAX_BRANCHES * num_bytes(key.signature) + 8

    def row_bytes(self, key: LaneKey) -> int:
        """Activations of one network row."""
        found = self.footprints.get(key.model)
        return int(found.row(key)) if found else 0

    def copy_bytes(self, key: LaneKey) -> int:
        """What a step holds of one row around the forward."""
        return COPIES * key.num_latents * 4 + num_bytes(key.signature) if key.model in self.footprints else 0

    def decode_bytes(self, model: str, num_latents: int) -> int:
        """Activations of decoding one image, or one tile where it is decoded in tiles."""
        found = self.footprints.get(model)
        return int(found.decode_per_latent * min(num_latents, TILE_ABOVE_PIXELS / found.pixels_per_latent)) if found else 0

    def step_bytes(self, key: LaneKey, rows: int, gathered: int = 0) -> int:
        """The most that is in use at once in a lane beside slots: a forward of ``rows`` rows, a decode, or a micro-batch of texts.

        Args:
            key: of the lane.
            rows: of one forward.
            gathered: rows of the largest job; they are gathered together, also where they go through the network in parts.
        """
        found = self.footprints.get(key.model)
        forward = rows * self.row_bytes(key) + max(rows, gathered) * self.copy_bytes(key)
        return max(forward, self.decode_bytes(key.model, key.num_latents), int(found.text) if found else 0)

    def num_rows(self, key: LaneKey, most: int, num_images: int = 0, gathered: int = 0) -> int:
        """Rows of one forward, at most ``most`` and at least one, beside a job of so many images and rows."""
        row, copied = self.row_bytes(key), self.copy_bytes(key)
        if not row + copied:
            return most
        left = min(int(self.room * STEP_SHARE), self.room - num_images * self.slot_bytes(key))
        rows = left // (row + copied)
        if rows < gathered:
            rows = (left - gathered * copied) // max(1, row)
        return max(1, min(most, rows))

    def num_captured(self, key: LaneKey, most: int) -> int:
        """Rows of the largest forward that may be captured, at most ``most``; 0 for none."""
        return min(most, int(self.room * GRAPH_SHARE) // max(1, self.row_bytes(key)))

    def needed_bytes(self, key: LaneKey, num_images: int = 1, gathered: int = 1, rows: int = 1) -> int:
        """What a job needs at least, with nothing beside it: a slot for each image, and the smallest step."""
        return num_images * self.slot_bytes(key) + self.step_bytes(key, rows, gathered)

    def check(self, request: Request, rows: int = 1) -> None:
        """Refuse a job that would not fit with nothing beside it.

        Args:
            request: its rows are known.
            rows: of the smallest forward: one, or those of the reproducible mode.

        Raises:
            OutOfMemory: the message names the field, the bytes needed and the bytes that there are.
        """
        key, asked, images = request.lane, request.work.request, request.num_images
        branches = request.rows // images

        def needed(count: int) -> int:
            return self.needed_bytes(key, count, count * branches, rows)

        if needed(images) <= self.room:
            return
        if needed(1) > self.room:
            least = "one row" if rows == 1 else f"{rows} rows"
            raise OutOfMemory(
                f"width, height: got {asked.width}, {asked.height}; one picture of that size needs {needed(1):,} bytes with {least} in a "
                f"step, and this worker has {self.room:,}; allowed: smaller ones"
            )
        most = next(count for count in range(images - 1, 0, -1) if needed(count) <= self.room)
        raise OutOfMemory(
            f"num_images: got {images}; of {asked.width} x {asked.height} px they need {needed(images):,} bytes, and this worker has "
            f"{self.room:,}; allowed: {most}"
        )
