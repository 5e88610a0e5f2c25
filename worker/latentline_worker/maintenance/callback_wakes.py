"""Hands callbacks whose next try is due to the processes that deliver them."""

from __future__ import annotations

from latentline.records import Records

from .turns import TURN_S, Turns


class CallbackWakes(Turns):
    """Runs in every callback process. Waking a callback twice is harmless: it is locked while it is tried."""

    def __init__(self, records: Records, process: str) -> None:
        super().__init__("callback wake-ups")
        self._records, self._process = records, process

    def take_turn(self) -> bool:
        return self._records.take_callbacks_turn(self._process, TURN_S)

    def do_turn(self) -> None:
        self._records.wake_callbacks()
