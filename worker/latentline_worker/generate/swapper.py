"""Loads a cold model for which jobs wait, in the place of those that were used least recently, while other models' jobs go on."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from latentline.records import Records
from latentline_worker.engine import residents
from latentline_worker.engine.engine import Engine
from latentline_worker.maintenance.service import Service
from latentline_worker.models import weights
from latentline_worker.models.base import Family

from .roster import Roster

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at what is due, and at whether a model's jobs have ended


class Loader(Protocol):
    """Reads models from their files."""

    def check(self, model: str) -> object:
        """Raises ModelError if the files of a model are not there."""
        ...

    def load(self, model: str) -> Family:
        """The model on the device."""
        ...


class _Stopped(Exception):
    """The worker shuts down."""


class Swapper(Service):
    """Exchanges models on a thread of its own: waiting, reading files and copying to the device happen here, and the engine's
    thread only takes up or lets go of what is complete.

    A model that has to go keeps its running jobs to their end; it only takes no more. Of several workers one at a time begins to
    load the same model: the others look again when that one has had the time to.

    Args:
        worker: the name of this worker.
        roster: the models.
        engine: runs their jobs.
        loader: reads them.
    """

    def __init__(self, records: Records, worker: str, roster: Roster, engine: Engine, loader: Loader) -> None:
        super().__init__("swapper", LOOK_S)
        self._records, self._worker, self._roster, self._engine, self._loader = records, worker, roster, engine, loader
        self._waits: Mapping[str, float] = {}
        self._load_s: dict[str, float] = {}  # how long loading each model took, from the first time on

    def hear(self, waits: Mapping[str, float]) -> None:
        """Of the models that have jobs: for how many seconds the oldest one has waited. From any thread."""
        self._roster.attention.busy(waits.keys())
        self._waits = waits

    def run_once(self) -> None:
        model = self._roster.due(self._waits)
        victims = None if model is None else self._roster.victims(model)
        if model is None or victims is None:
            return
        self._waits = {}  # what comes of it is heard at the next heartbeat
        life_s = self._roster.cold_wait_s + self._load_s.get(model, 0.0)
        if self._records.take_turn(f"load:{model}", self._worker, life_s):
            self._swap(model, victims)

    def _swap(self, model: str, victims: Sequence[str]) -> None:
        attention = self._roster.attention
        place = f" in the place of {', '.join(victims)}" if victims else ""
        log.info("%s: jobs wait for %s: it is loaded%s", self._worker, model, place)
        attention.changing = True
        try:
            self._loader.check(model)  # before anything else has to go
            for victim in victims:
                attention.close(victim)
            for victim in victims:
                self._let_go(victim)
            self._load(model, swapped=bool(victims))
        except _Stopped:
            pass
        except Exception as error:
            pause_s = self._roster.failed(model)
            for victim in set(victims) - set(self._roster.said().cold):
                attention.open(victim)
            if self.stopped:
                return
            log.error("%s: %s cannot be loaded, next try in %.0f s: %s", self._worker, model, pause_s, error)
        finally:
            attention.changing = False

    def _let_go(self, model: str) -> None:
        """Wait until the jobs of a model have ended, and free its memory."""
        while not (self._roster.attention.drained(model, LOOK_S) and self._roster.take_out(model)):
            if self.stopped:
                raise _Stopped
        self._engine.call(lambda: residents.remove(self._engine, model)).result()
        gc.collect()  # modules and their hooks refer to each other
        log.info("%s: %s has left memory", self._worker, model)

    def _load(self, model: str, *, swapped: bool) -> None:
        started = time.monotonic()
        family = self._loader.load(model)
        self._engine.call(lambda: residents.add(self._engine, family)).result()
        self._load_s[model] = time.monotonic() - started
        self._roster.put_in(model, family, weights.of_family(family), self._load_s[model], swapped=swapped)
        num_swaps: Sequence[int] = list(self._roster.said().swaps.values())
        log.info("%s: %s is in memory after %.1f s; %d swaps so far", self._worker, model, self._load_s[model], sum(num_swaps))
