"""What other threads read of a request: checkpoints, previews and results, published in host memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from latentline.errors import NumericalError
from latentline_worker.models.base import Family

from .checkpoint import Checkpoint, CheckpointSchedule
from .failures import out_of_memory, raise_if_lost
from .host_copies import HostCopies
from .lane import Lane
from .preview import LatentToRgb
from .request import Preview, Request

log = logging.getLogger(__name__)


class Publisher:
    """Copies a request's state to host memory. Used by the thread that owns the device.

    A job can do without a checkpoint or a preview: one that fails, mostly for want of memory, is logged and skipped, and
    the job keeps the one before. A lost device is raised.

    Args:
        families: the loaded models by id, all on one device.
        schedule: told what checkpoints cost. None: no periodic checkpoints, only one at shutdown.
    """

    def __init__(self, families: Mapping[str, Family], schedule: CheckpointSchedule | None) -> None:
        self._families = families
        self._schedule = schedule
        self._copies = HostCopies(next(iter(families.values())).device)
        self._rgb: dict[str, LatentToRgb] = {}

    @property
    def periodic(self) -> bool:
        """Whether checkpoints are taken beside the one at shutdown."""
        return self._schedule is not None

    def prepare_previews(self, model: str, channels: int) -> LatentToRgb:
        """Fit the model's map from latents to RGB, which takes a few decodes; otherwise the first preview does that."""
        self._rgb[model] = LatentToRgb.fit(self._families[model], channels)
        return self._rgb[model]

    def checkpoint(self, request: Request, lane: Lane) -> None:
        """Publish ``request.checkpoint``, as soon as it is complete."""
        step = request.step
        request.checkpoint_at = started = time.monotonic()  # Also set when the attempt fails, so that it is not retried at every step.

        def publish(tensors: Sequence[torch.Tensor]) -> None:
            request.checkpoint = Checkpoint(step, tensors[0].numpy())

        def copy() -> None:
            self._copies.copy([lane.snapshot(request)], publish)
            if self._schedule:
                self._schedule.record_taken(time.monotonic() - started)

        self._optional("checkpoint", request, copy)

    def preview(self, request: Request, lane: Lane) -> None:
        """Publish ``request.preview``, as soon as it is complete."""
        step = request.step

        def publish(tensors: Sequence[torch.Tensor]) -> None:
            request.preview = Preview(step, tensors[0].numpy())

        @torch.inference_mode()
        def copy() -> None:
            model, channels = request.work.model, request.work.latent_shape[0]
            rgb = self._rgb.get(model) or self.prepare_previews(model, channels)
            self._copies.copy([rgb(lane.denoised(request))], publish)

        self._optional("preview", request, copy)

    def conditions(self, request: Request) -> None:
        """Fail the request early if a tensor that the network is given of it holds NaN; see ``request.broken``."""
        names = sorted({name for row in request.conditions for name in row})

        def publish(tensors: Sequence[torch.Tensor]) -> None:
            broken = [name for name, found in zip(names, tensors[0].tolist(), strict=True) if found]
            if broken:
                request.broken = NumericalError(f"{', '.join(broken)} of {request.work.model}: not a number, for this job's texts")

        @torch.inference_mode()
        def copy() -> None:
            if names:
                flags = [torch.stack([torch.isnan(row[name]).any() for row in request.conditions]).any() for name in names]
                self._copies.copy([torch.stack(flags)], publish)

        self._optional("check of its rows", request, copy)

    def moment(self) -> Any:
        """A point in the device's queue; its time is known when a result that comes after it is published."""
        return self._copies.moment()

    def result(
        self,
        request: Request,
        moments: Mapping[str, Any],
        result: torch.Tensor,
        finite: torch.Tensor,
        finish: Callable[[torch.Tensor | Exception], None],
    ) -> None:
        """Call ``finish`` with the result as soon as it is in host memory, or with the error.

        Args:
            request: whose result it is; its times are completed.
            moments: when the device came to these events, by their names (:meth:`moment`).
            result: pixels or latents, on the device; not to be changed afterwards.
            finite: whether all latents are finite, a scalar on the device: reading it here would wait.
            finish: called once.
        """

        def publish(tensors: Sequence[torch.Tensor]) -> None:
            for event, moment in moments.items():
                request.times.setdefault(event, self._copies.time_of(moment))
            result, finite = tensors
            finish(result if finite else NumericalError("the latents are no longer finite numbers"))

        try:
            self._copies.copy([result, finite], publish)
        except Exception as error:
            raise_if_lost(error)
            finish(error)

    def publish_done(self) -> None:
        """Publish what has been copied. Does not wait."""
        self._copies.publish_done()

    def publish_all(self) -> None:
        """Wait until everything is copied, and publish it."""
        self._copies.publish_all()

    @staticmethod
    def _optional(what: str, request: Request, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            raise_if_lost(error)
            trace = None if out_of_memory(error) else error  # any other error is a defect: its place is worth knowing
            log.warning("job %s: no %s (%s)", request.work.job_id, what, type(error).__name__, exc_info=trace)
