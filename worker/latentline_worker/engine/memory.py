"""How much memory a lane needs, measured at warm-up, and how much the device has."""

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
from latentline_worker.samplers import MAX_ORDER

from .decoder import TILE_ABOVE_PIXELS
from .request import LaneKey
from .rows import MAX_BRANCHES, num_bytes

log = logging.getLogger(__name__)

USABLE = 0.9  # of what is free after loading: allocators fragment, and libraries allocate workspaces
SLOT_SHARE = 0.25  # of what is usable, at most, for images between steps; the rest is for the forward
MARGIN = 1.25  # on measured activations: workspaces inside kernels are not measured
ASSUMED_BYTES = 4 << 30  # free memory of a machine that does not report it


class _PeakOnCpu(TorchDispatchMode):
    """Sums the sizes of live operator outputs: PyTorch keeps no allocator statistics for the CPU."""

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
    """Peak of the bytes that the block allocated, beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with _PeakOnCpu() as mode:
            yield lambda: mode.peak


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that this process can still take: the GPU's, or the machine's within its control group.

    Args:
        device: whose memory.
        root: of the file system from which the machine's figures are read.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    machine, group = _machine_bytes(root / "proc"), _group_bytes(root / "sys/fs/cgroup")
    return machine if group is None else min(machine, group)


def _machine_bytes(proc: Path) -> int:
    """Memory that the kernel calls available; ``ASSUMED_BYTES`` where it does not say."""
    try:
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return ASSUMED_BYTES


def _group_bytes(group: Path) -> int | None:
    """What the control group (version 2) leaves of its limit; None without a limit."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        # Cached pages of files count as used, and the kernel frees them on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's activations per latent value: of one network row, and of one decoded image."""

    row: float
    decode: float
    pixels: float
    """Pixels per latent value: larger images are decoded in tiles."""


class Memory:
    """Decides how many images and rows of each size fit.

    Args:
        device: of the loaded models.
        limit_bytes: what the engine may use beside the weights; by default ``USABLE`` of what is free after loading.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None) -> None:
        self._device = device
        self.usable = limit_bytes if limit_bytes is not None else int(free_bytes(device) * USABLE)
        self.footprints: dict[str, Footprint] = {}  # by model; before a model's warm-up its activations count as nothing

    def measure(self, key: LaneKey, num_pixels: int, denoise: Callable[[], object], decode: Callable[[], object]) -> None:
        """Measure a model's footprint with one row's forward and one image's decode at a lane's shape.

        Args:
            key: of the lane.
            num_pixels: of one image of that shape.
        """
        with peak_bytes(self._device) as row:
            denoise()
        with peak_bytes(self._device) as image:
            decode()
        size = key.num_latents
        self.footprints[key.model] = Footprint(MARGIN * row() / size, MARGIN * image() / size, num_pixels / size)
        log.info(
            "memory: %d MB usable; a row of %s takes %.1f MB, a decode %.1f MB",
            self.usable >> 20, key.model, self.row_bytes(key) / 2**20, image() / 2**20,
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

    def row_bytes(self, key: LaneKey) -> int:
        """Activations of one network row. Proportional to the latents, because attention runs in memory-efficient kernels."""
        found = self.footprints.get(key.model)
        return int(found.row * key.num_latents) if found else 0

    def decode_bytes(self, key: LaneKey) -> int:
        """Activations of decoding one image, or one tile where it is decoded in tiles."""
        found = self.footprints.get(key.model)
        return int(found.decode * min(key.num_latents, TILE_ABOVE_PIXELS / found.pixels)) if found else 0

    def slot_bytes(self, key: LaneKey) -> int:
        """One image between steps: history in float32, and the rows of its guidance branches."""
        history = (2 * MAX_ORDER + 1) * key.num_latents * 4
        return history + MAX_BRANCHES * num_bytes(key.signature)

    def num_slots(self, key: LaneKey) -> int:
        """Images that a lane may hold between steps."""
        return max(1, int(self.usable * SLOT_SHARE) // self.slot_bytes(key))

    def num_rows(self, key: LaneKey, most: int) -> int:
        """Rows of one forward, at most ``most``."""
        room = int(self.usable * (1 - SLOT_SHARE))
        return max(1, min(most, room // self.row_bytes(key))) if key.model in self.footprints else most

    def check(self, key: LaneKey, rows: int = 1) -> None:
        """Refuse a lane that would not fit with ``rows`` rows in a forward: one, or those of the reproducible mode.

        Raises:
            OutOfMemory: the message names the bytes needed and the bytes usable.
        """
        needed = self.slot_bytes(key) + max(rows * self.row_bytes(key), self.decode_bytes(key))
        if needed > self.usable:
            shape, count = "x".join(map(str, key.latent_shape)), "one row" if rows == 1 else f"{rows} rows"
            raise OutOfMemory(
                f"latents of {shape} need {needed:,} bytes for {count} and this worker has {self.usable:,}: "
                "ask for a smaller width or height"
            )
