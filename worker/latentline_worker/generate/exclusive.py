"""A lock that lets jobs run together, or one alone. Runs crash suspects alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedExclusiveLock:
    """Many shared holders or one exclusive holder. A waiting exclusive holder goes before shared ones that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_shared = 0
        self._exclusive = False
        self._num_waiting = 0  # for exclusive use

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with other shared holders."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive and self._num_waiting == 0)
            self._num_shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone: waits for all present holders, and keeps later ones waiting."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._exclusive and self._num_shared == 0)
            self._num_waiting -= 1
            self._exclusive = True
        try:
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._changed.notify_all()
