"""Several processes that train one model: each draws its own batch, gradients are averaged, rank 0 writes.

They are started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK; without these there is one process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from .errors import TrainingError


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[int]:
    """Yields this process's rank, with the group of ``torchrun`` joined.

    Raises:
        TrainingError: the group cannot be joined.
    """
    if "RANK" not in os.environ:
        yield 0
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the group of processes cannot be joined: {str(error).splitlines()[0]}") from error
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(params: Sequence[torch.Tensor]) -> None:
    """Replace each gradient by its mean over the processes."""
    if num_processes() == 1:
        return
    for p in params:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= num_processes()


def any_of(flag: bool) -> bool:
    """Whether any process says so: all of them must leave the loop at the same step."""
    if num_processes() == 1:
        return flag
    answer = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(answer)
    return bool(answer > 0)


def wait_for_all() -> None:
    """Return once every process is here."""
    if num_processes() > 1:
        dist.barrier()
