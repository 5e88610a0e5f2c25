"""What this worker does now, for its heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from latentline.models import Working
from latentline_worker.engine.engine import Engine


class WorkingNow:
    """Reads the engine's counters, and makes averages of them since it was last asked.

    Args:
        jobs: how many jobs the worker holds now.
        capacity: how many it may hold.
        clock: seconds that never go back.
    """

    def __init__(self, engine: Engine, jobs: Callable[[], int], capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._jobs, self._capacity, self._clock = engine, jobs, capacity, clock
        self._device = _name(engine.device)
        self._before = self._counters()

    def __call__(self) -> Working:
        """The averages are over the time since the call before."""
        before, now = self._before, self._counters()
        self._before = now
        seconds, steps, rows = (after - earlier for after, earlier in zip(now, before, strict=True))
        return Working(
            device=self._device,
            jobs=self._jobs(),
            capacity=self._capacity,
            steps_per_s=round(steps / seconds, 2) if seconds > 0 else 0.0,
            rows_per_step=round(rows / steps, 2) if steps else 0.0,
            warm=tuple(self._engine.families),
        )

    def _counters(self) -> tuple[float, int, int]:
        return self._clock(), self._engine.num_steps, self._engine.num_rows


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
