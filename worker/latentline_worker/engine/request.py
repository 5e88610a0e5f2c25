"""One job in flight: what it asks of the engine, and how far it has come."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from latentline.jobs import Phase

from .checkpoint import Checkpoint

if TYPE_CHECKING:  # requests are built and read without torch
    import torch

    from latentline_worker.samplers import SamplerTable

_arrivals = itertools.count()


class Cancelled(Exception):
    """The job left the engine unfinished and through no error of its own; ``reason`` is a stable code."""

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
    """A job as the engine needs it: text and numbers in, pixels out."""

    job_id: str
    model: str
    prompt: str
    negative_prompt: str
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    priority: int = 5  # 0 is the most urgent
    tenant: str = "default"  # the planner divides the device fairly among tenants
    deadline: float | None = None  # time.monotonic(); the planner prefers jobs that are about to miss theirs
    preview_every: int = 0  # network calls between previews; 0 for none
    decode: bool = True  # False: the result is the latents
    resume: Checkpoint | None = None  # of another worker, to start from

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1  # as in diffusers: guidance has an effect only above 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode: an unguided job needs no negative prompt."""
        return (self.prompt, self.negative_prompt) if self.guided else (self.prompt,)

    @property
    def identity(self) -> list[object]:
        """JSON values that must be equal for a checkpoint's history to mean the same."""
        return [self.model, list(self.latent_shape), self.table.num_steps, self.table.order, list(self.seeds), self.guidance_scale]


@dataclass(frozen=True)
class Preview:
    """The images so far: (images, rows, columns, 3) uint8, one pixel per latent, in host memory."""

    step: int
    pixels: npt.NDArray[np.uint8]


@dataclass(eq=False)
class Request:
    """A job in flight. Only the engine's thread writes ``step`` and the fields after it, except for a cancel.

    Everything that other threads read is in host memory: no field makes its reader wait for the device.
    """

    work: Work
    future: Future[torch.Tensor] = field(default_factory=Future)
    step: int = 0  # network calls done
    shared_steps: int = 0  # of these, how many ran together with another job
    batch_jobs: int = 0  # jobs in the last call
    phase: Phase = Phase.ENCODING
    preview: Preview | None = None  # the newest that is complete
    checkpoint: Checkpoint | None = None  # the newest that is complete
    checkpoint_at: float = field(default_factory=time.monotonic)  # when the last one was begun
    prompt_tokens: tuple[int, int] = (0, 0)  # tokens in the prompt, and how many of them the text encoder reads
    text_tokens: int = 0  # length of the prompt embeds; known once the text is encoded
    slots: list[int] = field(default_factory=list)  # one per image, while in a lane
    arrival: int = field(default_factory=lambda: next(_arrivals))  # the order in which requests came
    times: dict[str, float] = field(default_factory=lambda: {"submitted": time.monotonic()})  # time.monotonic() of each event
    _cancel: str | None = None  # written by any thread, under the lock
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
        """Network rows of one step: a guided image needs two."""
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

    def reached(self, event: str) -> None:
        """Note the time at which ``event`` first happened."""
        self.times.setdefault(event, time.monotonic())

    def seconds(self, since: str, until: str) -> float:
        """Time between two events; 0 if either has not happened."""
        return self.times[until] - self.times[since] if since in self.times and until in self.times else 0.0

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for (images, height, width, 3) uint8 pixels, or (images, c, h, w) latents when ``work.decode`` is False.

        The tensor is in host memory, and complete.

        Raises:
            Cancelled: cancelled, or the engine stopped.
            NumericalError: the latents are no longer finite numbers.
            TimeoutError: not done within ``timeout_s``.
        """
        return self.future.result(timeout_s)

    def cancel(self, reason: str = "cancelled") -> None:
        """Leave the engine at the next step. May be called from any thread; the first reason counts."""
        with self._lock:
            self._cancel = self._cancel or reason

    @property
    def cancel_reason(self) -> str | None:
        return self._cancel
