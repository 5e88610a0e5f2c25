"""The thread that owns the device: plan, run, settle, one denoise step at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from latentline.errors import NumericalError
from latentline_worker.models.base import Family

from .batch import Lane
from .planner import Planner
from .request import Cancelled, Request, Work

log = logging.getLogger(__name__)


class Engine:
    """Denoises many jobs together. ``submit`` from any thread; each job's future gives its final latents.

    Args:
        family: the loaded model.
        max_rows: network rows of one forward (a guided image costs two).
    """

    def __init__(self, family: Family, max_rows: int) -> None:
        self.family = family
        self.planner = Planner(max_rows)
        self._lanes: dict[tuple[int, ...], Lane] = {}
        self._active: list[Request] = []
        self._incoming: list[Request] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.num_steps = 0  # forwards run
        self.num_shared_steps = 0  # of these, how many advanced two jobs or more

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish the step that runs, cancel what is in flight with reason ``shutdown``, end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, work: Work) -> Request:
        """Take part from the next step on."""
        request = Request(work)
        with self._wake:
            if self._stopping:
                request.future.set_exception(Cancelled("shutdown"))
                return request
            self._incoming.append(request)
            self._wake.notify()
        return request

    def step(self) -> None:
        """Plan, run, settle: one denoise step of one batch."""
        self._admit()
        batch = self.planner.select(self._active)
        failures = self._run(batch)
        self._settle(batch, failures)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._active or self._incoming or self._stopping)
                if self._stopping:
                    break
            self.step()
        for request in [*self._active, *self._incoming]:
            self._finish(request, Cancelled("shutdown"))

    def _admit(self) -> None:
        """Drop the cancelled; let the new ones join their lanes."""
        with self._wake:
            incoming, self._incoming = self._incoming, []
        for request in [r for r in self._active if r.cancel_reason]:
            self._finish(request, Cancelled(request.cancel_reason or ""))
        for request in incoming:
            if request.cancel_reason:
                self._finish(request, Cancelled(request.cancel_reason))
                continue
            try:
                self._lane(request).join(request)
                self._active.append(request)
            except Exception as error:  # this job's own failure: the batch goes on
                self._finish(request, error)

    def _run(self, batch: Sequence[Request]) -> dict[str, Exception]:
        """One forward for the batch; if it fails, one each, so that only the guilty fail."""
        if not batch:
            return {}
        lane = self._lane(batch[0])
        try:
            lane.step(batch)
            return {}
        except Exception as error:
            if len(batch) == 1:
                return {batch[0].work.job_id: error}
            log.warning("a step of %d jobs failed (%s): running them one by one", len(batch), type(error).__name__)
        failures: dict[str, Exception] = {}
        for request in batch:
            try:
                lane.step([request])
            except Exception as error:
                failures[request.work.job_id] = error
        return failures

    def _settle(self, batch: Sequence[Request], failures: dict[str, Exception]) -> None:
        """Count the step, hand out what is finished, fail what failed."""
        self.num_steps += bool(batch)
        self.num_shared_steps += len(batch) > 1
        ran = {id(request) for request in batch}
        for request in self._active:
            request.waited = 0 if id(request) in ran else request.waited + 1
        for request in batch:
            if error := failures.get(request.work.job_id):
                self._finish(request, error)
                continue
            request.step += 1
            request.batch_jobs = len(batch)
            request.shared_steps += len(batch) > 1
            if request.remaining == 0:
                lane = self._lane(request)
                if lane.finite(request):
                    self._finish(request, lane.latents(request))
                else:
                    self._finish(request, NumericalError("the latents are no longer finite numbers"))

    def _finish(self, request: Request, outcome: object) -> None:
        if request in self._active:
            self._active.remove(request)
        if request.slots:
            self._lane(request).leave(request)
        if isinstance(outcome, Exception):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)  # type: ignore[arg-type]

    def _lane(self, request: Request) -> Lane:
        if request.lane not in self._lanes:
            self._lanes[request.lane] = Lane(self.family, request.work.latent_shape)
        return self._lanes[request.lane]
