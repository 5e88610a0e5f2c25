"""Tensors on their way from the device to host memory, where other threads may read them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Publish = Callable[[Sequence[torch.Tensor]], None]


@dataclass(frozen=True)
class _Copy:
    copied: Any  # torch.cuda.Event
    tensors: list[torch.Tensor]
    publish: Publish


class HostCopies:
    """Hands tensors to other threads as complete host memory. Used by the thread that owns the device.

    A thread that reads a device tensor waits until the device has computed it, and behind a kernel that hangs it waits
    for ever. The threads that renew leases and watch the engine must not wait, so they are given host memory only.

    On CUDA the copy goes into pinned memory on a stream of its own, and is published when its event has happened:
    :meth:`publish_done` asks between steps. On a CPU it is published at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies: deque[_Copy] = deque()
        self._publishing: Any = None  # the event of the copy that is being published

    def copy(self, tensors: Sequence[torch.Tensor], publish: Publish) -> None:
        """Copy device tensors and call ``publish`` with their host copies, in the order of the calls.

        Args:
            tensors: must not be changed afterwards: on a CPU they are published themselves.
            publish: called by the engine's thread, from here or from :meth:`publish_done`.

        Raises:
            torch.AcceleratorError: CUDA has no pinned memory for the copies (:func:`~.failures.out_of_memory` tells);
                ``publish`` is not called.
        """
        if self._stream is None:
            publish(tensors)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the device waits, not this thread
        with torch.cuda.stream(self._stream):
            hosts = []
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                hosts.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._stream)  # its memory is not given to others before the copy is done
            copied = torch.cuda.Event(enable_timing=True)
            copied.record(self._stream)
        self._copies.append(_Copy(copied, hosts, publish))

    def moment(self) -> Any:
        """A point in the device's queue, for :meth:`time_of`."""
        if self._stream is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time_of(self, moment: Any) -> float:
        """``time.monotonic()`` at which the device came to a point before the copy that is published now."""
        if self._stream is None:
            return float(moment)
        assert self._publishing is not None  # called from ``publish``
        return float(time.monotonic() - moment.elapsed_time(self._publishing) / 1e3)

    def publish_done(self) -> None:
        """Publish the copies that are complete. Does not wait."""
        while self._copies and self._copies[0].copied.query():
            self._publish(self._copies.popleft())

    def publish_all(self) -> None:
        """Wait for the copies under way, and publish them. For when there is nothing else to launch."""
        while self._copies:
            copy = self._copies.popleft()
            copy.copied.synchronize()
            self._publish(copy)

    def _publish(self, copy: _Copy) -> None:
        self._publishing = copy.copied
        try:
            copy.publish(copy.tensors)
        finally:
            self._publishing = None
