"""Hands callbacks whose next try is due to the processes that deliver them."""

from __future__ import annotations

from latentline.records import Records

from .service import Service


class CallbackWakes(Service):
    """Runs in every callback process. Waking a callback twice is harmless: it is locked while it is tried."""

    def __init__(self, records: Records) -> None:
        super().__init__("callback wake-ups")
        self._records = records

    def run_once(self) -> None:
        self._records.wake_callbacks()
