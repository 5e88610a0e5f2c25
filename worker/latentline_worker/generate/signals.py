"""The signals thread: hears at once of cancels, and of jobs that other workers have taken over."""

from __future__ import annotations

import logging
import threading

from latentline.errors import LatentlineError
from latentline.records import Records

from .leases import Leases

log = logging.getLogger(__name__)

WAIT_S = 2.0  # of one call; the connection's own time limit is longer
PAUSE_S = 1.0  # after a failed call


class Signals:
    """Waits at the broker for this worker's signals and stops the jobs that they name.

    Nothing depends on a signal: a renewal of the lease tells the same a little later. So a broker that is away is left to the
    leases thread to report.

    Args:
        worker: the name of this worker.
        leases: the jobs in flight.
    """

    def __init__(self, records: Records, worker: str, leases: Leases) -> None:
        self._records, self._worker, self._leases = records, worker, leases
        self._stopped = threading.Event()
        # A daemon that nobody joins: at the end of the process it may be waiting at the broker.
        self._thread = threading.Thread(target=self._loop, name="signals", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            try:
                signal = self._records.next_signal(self._worker, WAIT_S)
            except LatentlineError as error:
                log.debug("signals: %s", error.message)
                self._stopped.wait(PAUSE_S)
            except Exception:
                log.exception("signals: a call failed")
                self._stopped.wait(PAUSE_S)
            else:
                if signal:
                    self._leases.stop_job(signal)
