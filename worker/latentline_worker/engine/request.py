"""One job in flight: what it asks of the network, and where it stands."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from latentline.errors import NumericalError
from latentline.jobs import Phase

if TYPE_CHECKING:  # the planner handles requests and stays torch-free
    import torch

    from latentline_worker.samplers import SamplerTable

    from .checkpoint import Checkpoint

_arrivals = itertools.count()


class Cancelled(Exception):
    """The job left the engine because somebody asked for it; ``reason`` is a stable code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LaneKey(NamedTuple):
    """Requests with equal keys can share a forward."""

    model: str
    latent_shape: tuple[int, int, int]
    text_tokens: int

    @property
    def num_latents(self) -> int:
        """Values in one image's latents."""
        channels, rows, columns = self.latent_shape
        return channels * rows * columns


@dataclass(frozen=True)
class Work:
    """What the engine needs to know of a job: text and numbers in, pixels out."""

    job_id: str
    model: str
    prompt: str
    negative_prompt: str
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    priority: int = 5  # 0 is served first
    tenant: str = "default"  # whose job it is: the planner gives each a fair share
    deadline: float | None = None  # time.monotonic(): the planner hurries what would be late
    preview_every: int = 0  # network calls between previews; 0: none
    decode: bool = True  # False: the result is the latents
    resume: Checkpoint | None = None  # where another worker left off

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1  # as in diffusers: at 1 and below there is nothing to guide


@dataclass(frozen=True)
class Preview:
    """How the images look so far: (images, rows, columns, 3) uint8, one pixel per latent."""

    step: int
    pixels: torch.Tensor


@dataclass(eq=False)
class Request:
    """A job in flight. The engine thread alone writes ``step`` and what follows it."""

    work: Work
    future: Future[torch.Tensor] = field(default_factory=Future)
    finite: torch.Tensor | None = None  # of the final latents; read where waiting for the device is no harm
    step: int = 0  # network calls done
    shared_steps: int = 0  # of these, how many ran together with another job
    batch_jobs: int = 0  # jobs in the last call
    phase: Phase = Phase.ENCODING
    preview: Preview | None = None  # the newest
    checkpoint: Checkpoint | None = None  # the newest
    checkpoint_at: float = field(default_factory=time.monotonic)
    prompt_tokens: tuple[int, int] = (0, 0)  # in the prompt; of these, read by the text encoder
    text_tokens: int = 0  # states per row of cross-attention; known once the text is encoded
    slots: list[int] = field(default_factory=list)  # one per image, while in a lane
    arrival: int = field(default_factory=lambda: next(_arrivals))  # first come, lowest
    times: dict[str, float] = field(default_factory=lambda: {"submitted": time.monotonic()})  # monotonic, by what happened
    _cancel: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_steps(self) -> int:
        return self.work.table.num_steps

    @property
    def remaining(self) -> int:
        return self.num_steps - self.step

    @property
    def num_images(self) -> int:
        return len(self.work.seeds)

    @property
    def rows(self) -> int:
        """Rows of the network that one step costs: guided images cost two."""
        return self.num_images * (2 if self.work.guided else 1)

    @property
    def priority(self) -> int:
        return self.work.priority

    @property
    def tenant(self) -> str:
        return self.work.tenant

    @property
    def deadline(self) -> float | None:
        return self.work.deadline

    @property
    def lane(self) -> LaneKey:
        return LaneKey(self.work.model, self.work.latent_shape, self.text_tokens)

    def reached(self, what: str) -> None:
        """Note the time of the first moment that ``what`` happened."""
        self.times.setdefault(what, time.monotonic())

    def seconds(self, since: str, until: str) -> float:
        """Between two moments; 0 where one has not come."""
        return self.times[until] - self.times[since] if since in self.times and until in self.times else 0.0

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for (images, height, width, 3) uint8 pixels, or (images, c, h, w) latents when ``work.decode`` is False.

        Raises:
            Cancelled: somebody asked for it.
            NumericalError: the latents are no longer finite numbers.
        """
        outcome = self.future.result(timeout_s).cpu()
        if self.finite is not None and not self.finite:
            raise NumericalError("the latents are no longer finite numbers")
        return outcome

    def cancel(self, reason: str = "cancelled") -> None:
        """Leave the engine at the next step; from any thread, the first reason counts."""
        with self._lock:
            self._cancel = self._cancel or reason

    @property
    def cancel_reason(self) -> str | None:
        return self._cancel
