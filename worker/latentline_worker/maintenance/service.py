"""What the maintenance services have in common: one duty, repeated on a thread of its own."""

from __future__ import annotations

import logging
import random
import threading
from abc import ABC, abstractmethod

from latentline.errors import LatentlineError

JITTER = 0.1  # of the wait, either way: processes that start together do not go on calling the broker together

log = logging.getLogger(__name__)


class Service(ABC):
    """One duty, done every ``every_s`` seconds on a thread of its own, from :meth:`start` to :meth:`stop`.

    Errors are logged and the loop continues, also while the broker is unreachable.

    Args:
        jitter: each wait is longer or shorter by up to this fraction, at random.
    """

    def __init__(self, name: str, every_s: float = 1.0, jitter: float = 0.0) -> None:
        self._name, self._every_s, self._jitter = name, every_s, jitter
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    @abstractmethod
    def run_once(self) -> None:
        """One turn of the duty."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait_s: float = 0.0) -> None:
        """Begin no further turn, and wait up to ``wait_s`` seconds for one that runs."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(wait_s)

    @property
    def stopped(self) -> bool:
        """Whether the service was told to stop."""
        return self._stopped.is_set()

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s * random.uniform(1 - self._jitter, 1 + self._jitter)):
            self._turn()

    def _turn(self) -> None:
        try:
            self.run_once()
        except LatentlineError as error:
            log.warning("%s: %s", self._name, error.message)
        except Exception:
            log.exception("%s failed", self._name)
