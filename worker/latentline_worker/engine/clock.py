"""How long steps take, and how much of it is the network's forward: by the clock on a CPU, by events on CUDA."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class StepClock:
    """Marks four moments of each step and gives the durations, without making the host wait for the current step.

    A step is :meth:`mark` four times, then :meth:`end_step`, or :meth:`drop` when it failed.

    On CUDA a step's durations are known one step later, and :meth:`take` waits for that step. So the host runs at most one
    step ahead of the device, and a cancelled or urgent job does not have to wait for more steps that were queued before.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._steps: deque[list[Any]] = deque()
        self.step_s = 0.0  # of all steps so far
        self.forward_s = 0.0

    def mark(self) -> None:
        """To be called at a step's start, the forward's start, the forward's end, and the step's end.

        Raises:
            torch.AcceleratorError: no memory for an event.
        """
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def end_step(self) -> None:
        """Keep the four marks: the step is committed. Cannot fail."""
        self._steps.append(self._marks)
        self._marks = []

    def drop(self) -> None:
        """Forget the marks of a step that failed."""
        self._marks = []

    def take(self) -> float | None:
        """Seconds of the oldest step that has ended and was not taken yet; None if there is none."""
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
