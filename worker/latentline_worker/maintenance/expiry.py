"""Deletes ended jobs when their retention is over: first the record, then its images.

It has a turn of its own, apart from the reaper's, so that an object store that hangs does not delay the reclaiming of jobs.
"""

from __future__ import annotations

from latentline.records import Records
from latentline_worker.images.store import ImageStore

from .turns import Turns

# Retention is long, so a few seconds more do not matter, also when a worker is killed in its turn.
EVERY_S = 5.0
TURN_S = 4.0


class Expiry(Turns):
    """Deletes all expired jobs. Images that the store does not delete are listed again ten minutes later.

    While one worker deletes many, others take turns too: the broker hands each job to one of them.
    """

    def __init__(self, records: Records, worker: str, store: ImageStore) -> None:
        super().__init__("expiry", EVERY_S)
        self._records, self._worker, self._store = records, worker, store

    def take_turn(self) -> bool:
        return self._records.take_turn("expiry", self._worker, TURN_S)

    def do_turn(self) -> None:
        while members := self._records.expired():
            for member in members:
                if self.stopped:
                    return
                if self._store.delete_all(f"{member}/"):
                    self._records.forget([member])
