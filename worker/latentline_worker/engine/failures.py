"""Which errors a device raises, and how a batch that failed is run again in smaller parts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator raises a bare RuntimeError. Pinned host memory that cannot be had is an AcceleratorError
    # (cudaErrorMemoryAllocation), which leaves the device usable.
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA error: out of memory" in text)


def device_lost(error: BaseException) -> bool:
    """Whether the accelerator reported an error other than missing memory: after one, every later call fails as well.

    Such an error must never be charged to a job. Every handler in the engine raises it again, so that it ends the
    engine's thread, and with it the process.
    """
    return isinstance(error, torch.AcceleratorError) and not out_of_memory(error)


def raise_if_lost(error: BaseException) -> None:
    """Raise ``error`` again if it means that the device is lost. To be called first in every handler.

    cuBLAS and cuDNN report a lost device as a plain RuntimeError. So with any error but missing memory the device is asked:
    after it is lost, every call of CUDA fails, and this one raises what CUDA itself says. It waits for the device, which
    only the engine's thread may do.
    """
    if device_lost(error):
        raise error
    if torch.cuda.is_initialized() and not out_of_memory(error):
        try:
            torch.cuda.synchronize()
        except Exception as found:
            if not out_of_memory(found):
                raise found from error


def release_memory(device: torch.device) -> None:
    """Give memory that the allocator keeps cached back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_in_parts(
    items: Sequence[T],
    run: Callable[[Sequence[T]], None],
    failed: Callable[[T, Exception], None],
    *,
    device: torch.device,
    size: int | None = None,
    divide: Callable[[Exception], bool] = lambda error: True,
) -> int:
    """Run all items; run a part that fails again in halves, so that only the items at fault fail.

    After an out-of-memory error, later parts are capped at the halved size, since they would run out too.

    Args:
        items: what to run, in order.
        run: runs a part of the items. It must leave nothing changed when it raises.
        failed: told of each item that fails by itself. May raise, which ends the run.
        device: gets its cached memory back after a failure.
        size: items in a part at most; by default all of them.
        divide: whether a part that raised this error is worth running in halves; if not, the error is raised.

    Returns:
        The most items in a part after the last division.
    """
    size = max(1, min(len(items), size or len(items)))
    parts = deque([items] if items else [])
    while parts:
        part = parts.popleft()
        if len(part) > size:
            parts.extendleft([part[size:], part[:size]])
            continue
        error = _attempt(run, part)
        if error is None:
            continue
        raise_if_lost(error)
        if not divide(error):
            raise error
        release_memory(device)
        if len(part) == 1:
            failed(part[0], error)
            continue
        half = (len(part) + 1) // 2
        if out_of_memory(error):
            size = half
        log.warning("%d together failed (%s): trying %d at a time", len(part), type(error).__name__, half)
        parts.extendleft([part[half:], part[:half]])
    return size


def _attempt(run: Callable[[Sequence[T]], None], part: Sequence[T]) -> Exception | None:
    try:
        run(part)
    except Exception as error:
        # The traceback's frames reference the tensors of the attempt, and would keep their memory.
        return error.with_traceback(None) if out_of_memory(error) else error
    return None
