"""How much of the device's memory a lane needs, measured at warm-up, and how much of it there is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentline.errors import OutOfMemory
from latentline_worker.models.base import Family
from latentline_worker.samplers import MAX_ORDER

from .decoder import TILE_ABOVE_PIXELS
from .request import LaneKey

log = logging.getLogger(__name__)

USABLE = 0.9  # of what is free after loading: allocators fragment, libraries take workspaces
SLOT_SHARE = 0.25  # of what is usable, at most, for jobs that wait between steps; the rest is for the forward
MARGIN = 1.25  # on measured activations: workspaces inside of kernels are not seen


class _PeakOnCpu(TorchDispatchMode):
    """Sums the sizes of live operator outputs: the CPU has no allocator statistics."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, tuple[int, int]] = {}  # storage address -> bytes, tensors that share it
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        _, sharers = self.live.get(address, (size, 0))
        self.live[address] = (size, sharers + 1)
        self.now += 0 if sharers else size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, address)

    def _drop(self, address: int) -> None:
        size, sharers = self.live.pop(address)
        if sharers > 1:
            self.live[address] = (size, sharers - 1)
        else:
            self.now -= size


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Bytes that the block needed at most beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with _PeakOnCpu() as mode:
            yield lambda: mode.peak


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take: the GPU's, or the machine's within its control group."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        # Pages of files are counted as used and given back on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return free if limit == "max" else min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, KeyError, ValueError):
        return 4 << 30 if "free" not in locals() else free


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations per latent value: of one network row, and of one decoded image."""

    row: float
    decode: float


class Memory:
    """Sizes lanes to the memory there is.

    Args:
        family: the loaded model.
        limit_bytes: what the engine may use beside the weights; by default most of what is free after loading.
    """

    def __init__(self, family: Family, limit_bytes: int | None = None) -> None:
        self._family = family
        self.usable = limit_bytes if limit_bytes is not None else int(free_bytes(family.device) * USABLE)
        self.footprint: Footprint | None = None  # until something is measured, nothing is refused

    def measure(self, key: LaneKey, denoise: Callable[[], object], decode: Callable[[], object]) -> None:
        """Learn the footprint from one row's forward and one image's decode of a lane's shape."""
        with peak_bytes(self._family.device) as row:
            denoise()
        with peak_bytes(self._family.device) as image:
            decode()
        self.footprint = Footprint(row=MARGIN * row() / key.num_latents, decode=MARGIN * image() / key.num_latents)
        log.info(
            "memory: %d MB usable; a row takes %.1f MB, a decode %.1f MB", self.usable >> 20, self.row_bytes(key) / 2**20, image() / 2**20
        )

    def row_bytes(self, key: LaneKey) -> int:
        """Activations of one network row. In proportion to the latents: attention runs in memory-efficient kernels."""
        return int(self.footprint.row * key.num_latents) if self.footprint else 0

    def decode_bytes(self, key: LaneKey) -> int:
        """Activations of decoding one image; one tile's where it is decoded in tiles."""
        if not self.footprint:
            return 0
        pixels = self._family.num_pixels(torch.empty(1, *key.latent_shape, device="meta"))
        return int(self.footprint.decode * key.num_latents * min(1.0, TILE_ABOVE_PIXELS / pixels))

    def slot_bytes(self, key: LaneKey, width: int) -> int:
        """One image between steps: history in float32, and both text states of ``width`` in the network's type."""
        history = (2 * MAX_ORDER + 1) * key.num_latents * 4
        return history + 2 * key.text_tokens * width * self._family.dtype.itemsize

    def num_slots(self, key: LaneKey, width: int) -> int:
        """Images that may wait between steps."""
        return max(1, int(self.usable * SLOT_SHARE) // self.slot_bytes(key, width))

    def num_rows(self, key: LaneKey, most: int) -> int:
        """Rows of one forward, at most ``most``."""
        room = int(self.usable * (1 - SLOT_SHARE))
        return max(1, min(most, room // self.row_bytes(key))) if self.footprint else most

    def check(self, key: LaneKey, width: int, rows: int = 1) -> None:
        """Refuse a lane that would not fit at ``rows`` rows: one, or those of the reproducible mode.

        Raises:
            OutOfMemory: names the bytes it would need and those there are.
        """
        needed = self.slot_bytes(key, width) + max(rows * self.row_bytes(key), self.decode_bytes(key))
        if needed > self.usable:
            shape, count = "x".join(map(str, key.latent_shape)), "one row" if rows == 1 else f"{rows} rows"
            raise OutOfMemory(
                f"latents of {shape} need {needed:,} bytes for {count} and this worker has {self.usable:,}: "
                "ask for a smaller width or height"
            )
