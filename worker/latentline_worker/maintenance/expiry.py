"""Deletes ended jobs when their retention is over: first the record, then its images.

It is separate from the reaper so that an object store that hangs does not delay the reclaiming of jobs.
"""

from __future__ import annotations

from latentline.records import Records
from latentline_worker.images.store import ImageStore

from .service import Service


class Expiry(Service):
    """Deletes a few expired jobs per turn. Images that the store does not delete are listed again ten minutes later."""

    def __init__(self, records: Records, store: ImageStore) -> None:
        super().__init__("expiry")
        self._records, self._store = records, store

    def run_once(self) -> None:
        for member in self._records.expired():
            if self.stopped:
                return
            if self._store.delete_all(f"{member}/"):
                self._records.forget([member])
