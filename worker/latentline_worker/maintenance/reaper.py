"""Requeues jobs that no worker holds: expired leases, lost messages, retries that are due."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence

from latentline.records import MAX_WAKE, Records

log = logging.getLogger(__name__)

MIN_GAP_S = 3.0  # turns come about once a second, and later from busy machines


class Reaper:
    """Takes jobs from lost workers and wakes waiting jobs again, in the turns that this process gets.

    Nothing is reclaimed before every worker has had the chance to renew its leases. Three conditions see to that:

    * Turns have followed each other without a gap for one lease. Their times are kept at the broker
      (:meth:`latentline.records.Records.begin_turn`), so this holds for every process, also for one that has just started or
      noticed nothing of an outage. A gap is longer than a third of a lease. A worker renews its leases when two thirds of
      them are left, so a shorter outage leaves it a third of a lease to do so.
    * The broker has been up for one lease.
    * This process has not found the broker unreachable for one lease. This covers outages shorter than a gap where leases
      are so short that ``MIN_GAP_S`` exceeds a third of them.

    Args:
        models: whose waiting jobs are checked for lost messages, one model a turn.
        lease_s: the lease of this worker; also how long a queued job may wait before its message may count as lost.
    """

    def __init__(self, records: Records, models: Sequence[str], lease_s: float) -> None:
        self._records, self._models, self._lease_s = records, itertools.cycle(models), lease_s
        self._not_before = float("-inf")  # time.monotonic()

    @property
    def paused(self) -> bool:
        """Whether this process found the broker unreachable less than one lease ago. Then it neither reclaims nor wakes."""
        return time.monotonic() < self._not_before

    def broker_lost(self) -> None:
        """The broker did not answer, here or elsewhere in this process: reclaim nothing for one lease. From any thread."""
        self._not_before = time.monotonic() + self._lease_s

    def reclaim(self) -> None:
        """Take the jobs of lost workers, if every worker has had the chance to renew its leases. Only in a turn."""
        # Noted while this process is paused, too: it has reached the broker.
        steady_s = self._records.begin_turn(max(MIN_GAP_S, self._lease_s / 3))
        if self.paused or steady_s <= self._lease_s or self._records.up_s() <= self._lease_s:
            return
        for job_id in self._records.reclaim():
            log.warning("job %s: its worker is lost, the job is taken from it", job_id)

    def wake(self) -> None:
        """Wake jobs of one model whose message is lost and all jobs whose next try is due; in several calls if they are many.

        The next turn looks at the next model: what a turn costs the broker does not grow with their number.
        """
        full, model = not self.paused, next(self._models)
        while full:
            woken = self._records.wake(model, self._lease_s)
            for job_id in woken:
                log.info("job %s: woken again", job_id)
            full = len(woken) >= MAX_WAKE
