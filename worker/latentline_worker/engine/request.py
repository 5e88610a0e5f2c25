"""One job in flight: what it asks of the engine, and how far it has come."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from latentline.jobs import Phase, ResolvedRequest

from .checkpoint import Checkpoint

if TYPE_CHECKING:  # requests are built and read without torch
    from collections.abc import Sequence

    import torch

    from latentline_worker.models.base import Family, Row, Text
    from latentline_worker.models.lora import AdapterSet
    from latentline_worker.samplers import SamplerTable

_arrivals = itertools.count()


class Cancelled(Exception):
    """The job left the engine unfinished and through no error of its own; ``reason`` is a stable code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Signature = tuple[tuple[str, tuple[int, ...], str], ...]
"""(name, shape, type) of each tensor of a row, by name."""


class LaneKey(NamedTuple):
    """Requests with equal keys can share a forward."""

    model: str
    latent_shape: tuple[int, int, int]
    signature: Signature  # of the rows

    @property
    def num_latents(self) -> int:
        """Values in one image's latents."""
        channels, rows, columns = self.latent_shape
        return channels * rows * columns


@dataclass(frozen=True)
class Work:
    """A job as the engine needs it: text and numbers in, pixels out. :meth:`of` makes it from a request."""

    job_id: str
    model: str
    weights: str  # a digest of them, and the type in which they run
    request: ResolvedRequest  # with its width and height filled in
    latent_shape: tuple[int, int, int]
    table: SamplerTable
    texts: tuple[Text, ...]  # one per guidance branch
    seeds: tuple[int, ...]  # one per image
    deadline: float | None = None  # time.monotonic(); the planner prefers jobs that are about to miss theirs
    decode: bool = True  # False: the result is the latents
    resume: Checkpoint | None = None  # of another worker, to start from
    adapters: AdapterSet | None = None

    @classmethod
    def of(cls, family: Family, request: ResolvedRequest, job_id: str, *, deadline: float | None = None, decode: bool = True) -> Work:
        """What a family makes of a request.

        Raises:
            InvalidRequest: the model does not make that size, or does not offer the scheduler or an adapter.
            CompileError: it cannot use the scheduler in this way.
            ModelError: an adapter's file cannot be read any more.
        """
        width, height = family.info.size_of(request)
        request = request.model_copy(update={"width": width, "height": height})
        adapters = family.adapters.find(request.loras) if family.adapters and request.loras else None
        texts = family.texts(request)
        if adapters and adapters.changes_text:
            texts = tuple(replace(text, adapters=adapters.parts) for text in texts)
        return cls(
            job_id=job_id,
            model=family.info.id,
            weights=f"{family.revision} {family.dtype}",
            request=request,
            latent_shape=family.latent_shape(width, height),
            table=family.table(request),
            texts=texts,
            seeds=tuple(request.seed + i for i in range(request.num_images)),
            deadline=deadline,
            decode=decode,
            adapters=adapters,
        )

    @property
    def guided(self) -> bool:
        return len(self.texts) > 1

    @property
    def identity(self) -> str:
        """A digest of all that the latents depend on: a checkpoint of other work does not continue this one."""
        request = self.request
        parts = [
            self.model, self.weights, self.latent_shape, self.table.digest, self.seeds, request.guidance_scale,
            [(text.prompt, text.negative) for text in self.texts], request.width, request.height,
            self.adapters.parts if self.adapters else (),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Preview:
    """The images so far: (images, rows, columns, 3) uint8, one pixel per latent, in host memory."""

    step: int
    pixels: npt.NDArray[np.uint8]


@dataclass(eq=False)
class Step:
    """One network call; the requests that shared it hold the same object."""

    at: float  # time.monotonic() when it was launched
    job_ids: tuple[str, ...]  # of the jobs that shared it
    rows: int  # of all of them
    seconds: float | None = None  # that it took; known later


@dataclass(eq=False)
class Request:
    """A job in flight. Only the engine's thread writes ``step`` and the fields after it, except for a cancel.

    Everything that other threads read is in host memory: no field makes its reader wait for the device.
    """

    work: Work
    future: Future[torch.Tensor] = field(default_factory=Future)
    step: int = 0  # network calls done
    steps: list[Step] = field(default_factory=list)  # those that this worker has done
    shared_steps: int = 0  # of these, how many ran together with another job
    batch_jobs: int = 0  # jobs in the last call
    phase: Phase = Phase.ENCODING
    preview: Preview | None = None  # the newest that is complete
    checkpoint: Checkpoint | None = None  # the newest that is complete
    checkpoint_at: float = field(default_factory=time.monotonic)  # when the last one was begun
    tokens: tuple[tuple[int, int], ...] = ()  # of each of the work's texts: tokens in it, and how many the text encoder reads
    conditions: Sequence[Row] = ()  # one row per guidance branch: from when the texts are encoded until the lane holds them
    signature: Signature = ()  # of those rows
    broken: Exception | None = None  # what is wrong with them, once it is known: the device was not waited for
    adapter_slot: int | None = None  # of its adapters in the model's bank, from before its texts are encoded; 0 for none
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
        """Network rows of one step: one per image and guidance branch."""
        return self.num_images * len(self.work.texts)

    @property
    def priority(self) -> int:
        return self.work.request.priority

    @property
    def tenant(self) -> str:
        return self.work.request.tenant

    @property
    def deadline(self) -> float | None:
        return self.work.deadline

    @property
    def lane(self) -> LaneKey:
        return LaneKey(self.work.model, self.work.latent_shape, self.signature)

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
