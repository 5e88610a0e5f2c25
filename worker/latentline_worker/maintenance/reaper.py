"""Requeues jobs that no worker holds: expired leases, lost messages, retries that are due."""

from __future__ import annotations

import logging
import time

from latentline.errors import LatentlineError
from latentline.records import Records

from .service import Service

log = logging.getLogger(__name__)


class Reaper(Service):
    """Runs in every worker: the first one to notice an expired lease reclaims the job.

    After the broker was unreachable, nothing is reclaimed for one lease: all leases may have expired meanwhile, and each worker
    must have the chance to renew its own first. The same holds while the broker itself has been up for less than a lease.

    Args:
        model: the model whose waiting jobs are checked for lost messages.
        lease_s: the lease of this worker; also how long a queued job may wait before its message may count as lost.
    """

    def __init__(self, records: Records, model: str, lease_s: float) -> None:
        super().__init__("reaper")
        self._records, self._model, self._lease_s = records, model, lease_s
        self._not_before = float("-inf")  # time.monotonic()

    def broker_lost(self) -> None:
        """The broker did not answer, here or elsewhere in this process: reclaim nothing for one lease. From any thread."""
        self._not_before = time.monotonic() + self._lease_s

    def run_once(self) -> None:
        if time.monotonic() < self._not_before:
            return
        try:
            self._put_back()
        except LatentlineError:
            self.broker_lost()
            raise

    def _put_back(self) -> None:
        lost = self._records.reclaim() if self._records.up_s() > self._lease_s else []
        for job_id in lost:
            log.warning("job %s: its worker is lost, the job is taken from it", job_id)
        for job_id in self._records.wake(self._model, self._lease_s):
            log.info("job %s: woken again", job_id)
