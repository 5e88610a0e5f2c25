"""Stand-ins for the parts of a worker that need a device: an engine whose jobs a test finishes by hand, a store in memory."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from diffusers import DDIMScheduler

from latentline.records import Records
from latentline.testing import MODEL
from latentline_worker.engine.request import Cancelled, Request, Work
from latentline_worker.generate.leases import Leases
from latentline_worker.generate.metrics import JobMetrics
from latentline_worker.generate.roster import Roster
from latentline_worker.generate.runner import JobRunner
from latentline_worker.images.upload import Uploader
from latentline_worker.models.base import Text
from latentline_worker.samplers import sampler_table

PATIENCE_S = 60  # how long a test waits for a signal before it fails; no test measures time

CONFIG = dict(DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).config)

# What the runner and the worker process use of a model family.
FAMILY = cast(
    Any,
    SimpleNamespace(
        info=MODEL,
        revision="test",
        adapters=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        latent_shape=lambda width, height: (4, height // 8, width // 8),
        table=lambda request: sampler_table(request.scheduler, CONFIG, request.num_inference_steps),
        texts=lambda request: (Text(request.prompt),),
    ),
)


def pixels(work: Work) -> torch.Tensor:
    """Grey images of the work's size: (images, height, width, 3) uint8."""
    _, rows, columns = work.latent_shape
    return torch.full((len(work.seeds), 8 * rows, 8 * columns, 3), 128, dtype=torch.uint8)


class StubEngine:
    """Hands each submitted request to the test; with ``at_once`` every request succeeds immediately."""

    checkpoint_schedule = None
    device = torch.device("cpu")
    families: ClassVar = {MODEL.id: FAMILY}
    num_steps = num_rows = 0
    fixed_rows = None

    def __init__(self, at_once: bool = False) -> None:
        self.submitted: queue.Queue[Request] = queue.Queue()
        self.requests: list[Request] = []  # all that were ever submitted
        self.stalled_s = 0.0
        self._at_once = at_once

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def stalled_for(self) -> float:
        return self.stalled_s

    def submit(self, work: Work) -> Request:
        request = Request(work)
        self.requests.append(request)
        if self._at_once:
            self.finish(request)
        self.submitted.put(request)
        return request

    def next(self) -> Request:
        """The next submitted request."""
        return self.submitted.get(timeout=PATIENCE_S)

    def finish(self, request: Request) -> None:
        request.step = request.num_steps
        request.future.set_result(pixels(request.work))

    def abandon_all(self) -> None:
        """Let no thread wait for a request that the test has left unfinished."""
        for request in self.requests:
            if not request.future.done():
                self.stop_request(request, "lost")

    def stop_request(self, request: Request, reason: str) -> None:
        """End a request as the engine does when it was cancelled, or is shut down."""
        request.future.set_exception(Cancelled(reason))


class MemoryStore:
    """An object store in memory. ``problem`` is raised by every upload while it is set."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.problem: Exception | None = None

    def put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None:
        if self.problem:
            raise self.problem
        self.objects[key] = data


class RunnerBench:
    """A real :class:`JobRunner` over real records and leases; only engine and object store are stand-ins."""

    def __init__(self, records: Records, at_once: bool = False) -> None:
        self.records, self.engine, self.store = records, StubEngine(at_once), MemoryStore()
        self.metrics = JobMetrics()
        self.leases = Leases(records, lease_s=30, metrics=self.metrics)
        self.runner = JobRunner(
            "cpu@test",
            Roster.of([FAMILY]),
            records,
            cast(Any, self.engine),
            Uploader(cast(Any, self.store)),
            self.leases,
            lease_s=30,
            metrics=self.metrics,
        )
