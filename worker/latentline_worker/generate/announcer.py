"""Tells the fleet that this worker is alive and which models it serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from latentline.errors import LatentlineError
from latentline.models import Working
from latentline.records import Records
from latentline_worker.maintenance.service import JITTER, Service

from .roster import Roster, Said

HEARTBEAT_S = 3.0  # three may be lost before the worker counts as gone, see latentline.records.fleet.WORKER_ALIVE_S


class Announcer(Service):
    """Announces the worker, then sends short heartbeats, whose answers tell what waits for its models. Announces it again when
    something of what it says has changed, or the broker no longer knows it.

    At the end the worker is taken off the list of live workers. Its announcement holds for another minute
    (``latentline.records.fleet.ANNOUNCED_S``), so that submissions are accepted while it restarts.

    Args:
        working: what the worker does now; it goes with each heartbeat.
        heard: told of each model that has jobs, and for how many seconds the oldest of them has waited.
    """

    def __init__(
        self,
        records: Records,
        worker: str,
        roster: Roster,
        working: Callable[[], Working],
        heard: Callable[[Mapping[str, float]], None] = lambda waits: None,
    ) -> None:
        # Not less often than what waits for a cold model has to be known.
        super().__init__("announcer", HEARTBEAT_S if roster.all_fit else min(HEARTBEAT_S, roster.cold_wait_s), JITTER)
        self._records, self._worker, self._roster, self._working, self._heard = records, worker, roster, working, heard
        self._said: Said | None = None  # since this process started: an announcement under this name may be that of an earlier process

    def start(self) -> None:
        """Announce at once; if that fails, the service does it later."""
        self._turn()
        super().start()

    def run_once(self) -> None:
        said = self._roster.said()
        waits = self._records.heartbeat(self._worker, self._working(), self._roster.ids) if said == self._said else None
        if waits is None:
            self._records.announce(self._worker, said.models, said.cold, said.swaps)
            self._said = said
        else:
            self._heard(waits)

    def stop(self, wait_s: float = 5.0) -> None:
        """Stop, then leave the list of live workers. Waits for a turn that runs: it would announce the worker again."""
        super().stop(wait_s)
        with contextlib.suppress(LatentlineError):  # the broker may have ended first
            self._records.worker_gone(self._worker)
