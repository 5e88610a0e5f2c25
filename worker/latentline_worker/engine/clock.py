"""How long a step takes, and how much of it the network's forward: on a CPU by the clock, on CUDA by events."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class StepClock:
    """Marks four moments of each step, and gives the durations without making the host wait for the device.

    On CUDA the figures of a step come one step late, and the host is held from running further ahead than that:
    a cancelled or urgent job would otherwise find steps already queued on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._steps: deque[list[Any]] = deque()
        self.step_s = 0.0  # of all steps so far
        self.forward_s = 0.0

    def mark(self) -> None:
        """Called at a step's start, the forward's start, the forward's end, the step's end."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        if len(self._marks) == 4:
            self._steps.append(self._marks)
            self._marks = []

    def drop(self) -> None:
        """Forget a step that failed half-way."""
        self._marks = []

    def take(self) -> float | None:
        """Seconds of a step that has ended, oldest first; None when there is none yet."""
        if not self._steps or (self._cuda and len(self._steps) < 2):
            return None
        marks = self._steps.popleft()
        if self._cuda:
            marks[3].synchronize()
            step_s, forward_s = marks[0].elapsed_time(marks[3]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3
        else:
            step_s, forward_s = marks[3] - marks[0], marks[2] - marks[1]
        self.step_s += step_s
        self.forward_s += forward_s
        return float(step_s)
