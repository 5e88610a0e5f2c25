"""What this worker does now, for its heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from latentline.models import StepCost, Working
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.request import LaneKey


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
        self._costs: dict[str, StepCost] = {}

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
            costs=self._measured(),
        )

    def _measured(self) -> dict[str, StepCost]:
        """What a step of each model in memory takes, in its lane with the most steps."""
        most: dict[str, int] = {}
        for lane, (steps, rows, seconds) in self._engine.planner.cost.best().items():
            family = self._engine.families.get(lane.model) if isinstance(lane, LaneKey) else None
            if family is None or not isinstance(lane, LaneKey) or steps <= most.get(lane.model, 0) or seconds <= 0:
                continue
            most[lane.model] = steps
            info = family.info
            _, height, width = family.latent_shape(info.default_width, info.default_height)
            pixels = info.default_width * info.default_height * lane.latent_shape[1] * lane.latent_shape[2] // (height * width)
            self._costs[lane.model] = StepCost(rows=rows, step_s=float(f"{seconds:.3g}"), pixels=max(1, pixels))
        return {model: cost for model, cost in self._costs.items() if model in self._engine.families}

    def _counters(self) -> tuple[float, int, int]:
        return self._clock(), self._engine.num_steps, self._engine.num_rows


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
