"""What happens to a request after its last step: decoded, copied to the host, finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from latentline.jobs import Phase
from latentline_worker.models.base import Family

from .decoder import Decoder
from .failures import raise_if_lost
from .lane import Lane
from .publisher import Publisher
from .request import Cancelled, Request


class Delivery:
    """Turns final latents into results. Used by the thread that owns the device.

    Args:
        families: the loaded models by id.
        decoder: makes the pixels, in one of the next steps.
        publisher: copies results to the host.
        leave: frees the request's slots.
        finish: ends the request, with its result in host memory or with the error.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        decoder: Decoder,
        publisher: Publisher,
        leave: Callable[[Request], None],
        finish: Callable[[Request, torch.Tensor | Exception], None],
    ) -> None:
        self._families, self._decoder, self._publisher = families, decoder, publisher
        self._leave, self._finish = leave, finish

    def denoised(self, request: Request, lane: Lane) -> None:
        """All steps are done: free the slots; decode in one of the next steps."""
        latents = lane.latents(request)
        if self._publisher.periodic:  # so that a delivery that fails later does not repeat the denoising
            self._publisher.checkpoint(request, lane)
        finite = torch.isfinite(latents).all()
        moments = {"denoised": self._publisher.moment()}
        self._leave(request)
        if not request.work.decode:
            self._publisher.result(request, moments, latents, finite, lambda outcome: self._finish(request, outcome))
            return
        request.phase = Phase.DECODING
        family = self._families[request.work.model]
        self._decoder.submit(family, latents, lambda outcome: self._decoded(request, outcome, finite, moments))

    def _decoded(self, request: Request, outcome: torch.Tensor | Exception, finite: torch.Tensor, moments: dict[str, Any]) -> None:
        if request.cancel_reason:
            self._finish(request, Cancelled(request.cancel_reason))
        elif isinstance(outcome, Exception):
            self._finish(request, outcome)
        else:
            try:
                moments["decoded"] = self._publisher.moment()
            except Exception as error:  # no memory for an event: the picture is there all the same
                raise_if_lost(error)
            self._publisher.result(request, moments, outcome, finite, lambda outcome: self._finish(request, outcome))
