"""One job in flight: what it asks of the network, and where it stands."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the planner handles requests and stays torch-free
    import torch

    from latentline_worker.samplers import SamplerTable


class Cancelled(Exception):
    """The job left the batch because somebody asked for it; ``reason`` is a stable code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Work:
    """What the engine needs to know of a job. Text states are (tokens, width)."""

    job_id: str
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    cond: torch.Tensor
    uncond: torch.Tensor | None  # None where guidance_scale <= 1: such a row costs one, not two
    priority: int = 5


@dataclass(eq=False)
class Request:
    """A job in flight. The engine thread alone writes ``step`` and what follows it."""

    work: Work
    future: Future[torch.Tensor] = field(default_factory=Future)  # (images, c, h, w) latents
    step: int = 0  # network calls done
    shared_steps: int = 0  # of these, how many ran together with another job
    batch_jobs: int = 0  # jobs in the last call
    waited: int = 0  # engine steps since it last ran
    slots: list[int] = field(default_factory=list)  # one per image, while in a lane
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    _cancel: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_steps(self) -> int:
        return self.work.table.num_steps

    @property
    def remaining(self) -> int:
        return self.num_steps - self.step

    @property
    def guided(self) -> bool:
        return self.work.uncond is not None

    @property
    def num_images(self) -> int:
        return len(self.work.seeds)

    @property
    def rows(self) -> int:
        """Rows of the network that one step costs."""
        return self.num_images * (2 if self.guided else 1)

    @property
    def lane(self) -> tuple[int, ...]:
        """Requests with equal lanes can share a forward."""
        return self.work.latent_shape

    def cancel(self, reason: str = "cancelled") -> None:
        """Leave the batch at the next step; from any thread, the first reason counts."""
        with self._lock:
            self._cancel = self._cancel or reason

    @property
    def cancel_reason(self) -> str | None:
        return self._cancel
