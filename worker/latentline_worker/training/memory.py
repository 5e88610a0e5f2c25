"""Whether a training fits into memory, asked before it begins: shapes are run without data on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .errors import TrainingError

RESERVE = 0.9  # share of the free memory that may be planned with; allocators and libraries need the rest


def weights_bytes(model: torch.nn.Module, ema: bool) -> int:
    """Weights, gradients, two moments of AdamW and the average, all in fp32."""
    return sum(p.numel() for p in model.parameters()) * 4 * (5 if ema else 4)


def activation_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass.

    Args:
        run: builds the model and its inputs on the current default device, and returns the loss.
    """
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed could give its identity to the next one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that this process could still take, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return free


def check(needed: int, what: str, free: int | None) -> None:
    """Raises: TrainingError: ``needed`` bytes do not fit into the free ones."""
    if free is not None and needed > RESERVE * free:
        raise TrainingError(
            f"{what} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: lower schedule.batch or the model's widths"
        )
