"""Ends the process when the device hangs: nothing interrupts such a call, so only a new process helps."""

from __future__ import annotations

from collections.abc import Callable

from latentline_worker.maintenance.service import Service

INTERVAL_S = 0.1


class Watchdog(Service):
    """Calls ``abort`` once the engine is stalled and no job is left that can still end without it.

    It runs on a thread of its own that never touches the device or the broker: whatever else blocks behind a hung
    device, this thread does not.

    Args:
        engine_stalled: whether the engine has finished nothing for too long although it has work, or has failed.
        uploads_left: whether jobs are being uploaded, which need the engine no longer.
        abort: ends the process.
    """

    def __init__(self, engine_stalled: Callable[[], bool], uploads_left: Callable[[], bool], abort: Callable[[], None]) -> None:
        super().__init__("watchdog", INTERVAL_S)
        self._engine_stalled, self._uploads_left, self._abort = engine_stalled, uploads_left, abort

    def run_once(self) -> None:
        if self._engine_stalled() and not self._uploads_left():
            self._abort()
