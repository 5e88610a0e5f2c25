"""Tells the fleet that this worker is alive and which models it serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from latentline.errors import LatentlineError
from latentline.jobs import ModelInfo
from latentline.models import Working
from latentline.records import Records
from latentline_worker.maintenance.service import JITTER, Service

HEARTBEAT_S = 3.0  # three may be lost before the worker counts as gone, see latentline.records.fleet.WORKER_ALIVE_S


class Announcer(Service):
    """Announces the worker once, then sends short heartbeats, and announces again when the broker no longer knows it.

    At the end the worker is taken off the list of live workers. Its announcement holds for another minute
    (``latentline.records.fleet.ANNOUNCED_S``), so that submissions are accepted while it restarts.

    Args:
        working: what the worker does now; it goes with each heartbeat.
    """

    def __init__(self, records: Records, worker: str, models: Sequence[ModelInfo], working: Callable[[], Working]) -> None:
        super().__init__("announcer", HEARTBEAT_S, JITTER)
        self._records, self._worker, self._models, self._working = records, worker, models, working
        self._announced = False  # since this process started: an announcement under this name may be that of an earlier process

    def start(self) -> None:
        """Announce at once; if that fails, the service does it later."""
        self._turn()
        super().start()

    def run_once(self) -> None:
        if not (self._announced and self._records.heartbeat(self._worker, self._working())):
            self._records.announce(self._worker, self._models)
            self._announced = True

    def stop(self, wait_s: float = 5.0) -> None:
        """Stop, then leave the list of live workers. Waits for a turn that runs: it would announce the worker again."""
        super().stop(wait_s)
        with contextlib.suppress(LatentlineError):  # the broker may have ended first
            self._records.worker_gone(self._worker)
