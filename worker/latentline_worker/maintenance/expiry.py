"""Images go with their records. On a thread of its own: a store that hangs must not hold up the heartbeat."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from latentline.errors import LatentlineError
from latentline.records import Records

log = logging.getLogger(__name__)

EVERY_S = 1.0


class Store(Protocol):
    """Where images are deleted (``store.ImageStore``)."""

    def delete_all(self, prefix: str) -> bool: ...


class Expiry:
    """Forgets ended jobs whose retention is over, a few at a time; what cannot be deleted comes again later."""

    def __init__(self, records: Records, store: Store) -> None:
        self._records, self._store = records, store
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="expiry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Do not begin another deletion; one that is under way may go on until the process ends."""
        self._stopped.set()

    def expire_some(self) -> None:
        """One look: the records of what is over, then their images."""
        for member in self._records.expired():
            if self._stopped.is_set():
                return
            if self._store.delete_all(f"{member}/"):
                self._records.forget([member])

    def _loop(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.expire_some()
            except LatentlineError as error:
                log.warning("expiry: %s", error.message)
            except Exception:
                log.exception("expiry failed")
