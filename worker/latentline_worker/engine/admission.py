"""Requests on their way into a lane: their texts are encoded, then each image gets a slot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from latentline_worker.models.base import Family

from .conditioning import Conditioner
from .failures import raise_if_lost
from .lanes import Lanes
from .publisher import Publisher
from .request import LaneKey, Request
from .rows import common_signature


@dataclass
class _Queue:
    """Which requests have to wait because an earlier one does. Free memory goes to the earliest."""

    full: set[LaneKey] = field(default_factory=set)  # lanes in which one waits for slots: later ones must not overtake it
    closed: bool = False  # one waits until other lanes are empty: nothing may join them, or it would wait for ever


class Admission:
    """The requests that wait for a lane. Used by the thread that owns the device.

    Args:
        families: the loaded models by id.
        conditioner: encodes their texts.
        lanes: where they go.
        publisher: looks at what the families make of the texts.
        row_bytes: what the rows of waiting requests may take before no further text is encoded.
    """

    def __init__(
        self, families: Mapping[str, Family], conditioner: Conditioner, lanes: Lanes, publisher: Publisher, row_bytes: int = sys.maxsize
    ) -> None:
        self._families, self._conditioner, self._lanes, self._publisher = families, conditioner, lanes, publisher
        self._row_bytes = row_bytes
        self.waiting: list[Request] = []  # text not encoded yet, or no slot free; the most urgent first

    def add(self, requests: Iterable[Request]) -> None:
        self.waiting = sorted([*self.waiting, *requests], key=lambda r: (r.work.request.priority, r.arrival))

    def remove(self, request: Request) -> None:
        """The request leaves, if it is waiting here."""
        if request in self.waiting:
            self.waiting.remove(request)

    def admit(self, joined: Callable[[Request], None], failed: Callable[[Request, Exception], None]) -> None:
        """Encode one micro-batch of text, and move requests whose texts are encoded into their lanes.

        Args:
            joined: told of each request that is in its lane; may raise, which fails that request.
            failed: told of each request that cannot be admitted, or whose ``joined`` raised.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        for request in list(self.waiting):
            try:
                self._acquire_adapters(request)
            except Exception as problem:
                raise_if_lost(problem)
                failed(request, problem)
        ready = self._ready()
        wanted = ((self._families[r.work.model], text) for r in ready if not r.conditions for text in r.work.texts)
        failures = self._conditioner.encode_some(wanted)
        queue = _Queue()
        for request in ready:
            try:
                for text in request.work.texts:
                    if error := failures.get((request.work.model, text)):
                        raise error
                if self._condition(request) and self._join(request, queue):
                    joined(request)
            except Exception as error:
                raise_if_lost(error)
                failed(request, error)

    def _ready(self) -> list[Request]:
        """The requests that may have rows: those with adapters, as far as the memory for rows that wait goes."""
        ready, taken = [], 0
        for request in self.waiting:
            if request.adapter_slot is not None and taken <= self._row_bytes:
                ready.append(request)
                taken += sum(tensor.nbytes for row in request.conditions for tensor in row.values())
        return ready

    def _acquire_adapters(self, request: Request) -> None:
        """Put the request's adapters into a slot of the bank; where none is free, it waits for the jobs that hold them."""
        adapters = self._families[request.work.model].adapters
        if request.adapter_slot is None:
            wanted = request.work.adapters
            request.adapter_slot = adapters.acquire(wanted) if adapters and wanted else 0

    def release_adapters(self, request: Request) -> None:
        """The request needs its adapters no more."""
        adapters = self._families[request.work.model].adapters
        if adapters and request.adapter_slot:
            adapters.release(request.adapter_slot)
        request.adapter_slot = None

    def _condition(self, request: Request) -> bool:
        """Make the request's rows, once its texts are encoded; whether it has them.

        Raises:
            ModelError: the family made rows that no batch can hold.
        """
        if request.conditions:
            return True
        work, family = request.work, self._families[request.work.model]
        encoded = [found for text in work.texts if (found := self._conditioner.get(family, text)) is not None]
        if len(encoded) < len(work.texts):
            return False
        rows = family.rows(work.request, encoded)
        request.signature = common_signature(work.model, rows, len(work.texts))
        request.conditions, request.tokens = rows, tuple(one.tokens for one in encoded)
        request.reached("encoded")
        self._publisher.conditions(request)
        return True

    def _join(self, request: Request, queue: _Queue) -> bool:
        """Move the request into its lane if there is a slot for each image; else it waits."""
        key = request.lane
        if queue.closed or key in queue.full:
            return False
        self._lanes.check(request)
        lane = self._lanes.reserve(request, may_grow=not queue.full)
        if lane is None:
            queue.full.add(key)
            queue.closed = not self._lanes.suffices(request)
            return False
        lane.join(request, request.conditions)
        request.conditions = ()  # the lane holds them
        self.remove(request)
        return True
