"""Ends queued jobs at their deadline, whether or not a worker could take them."""

from __future__ import annotations

import logging

from latentline.records import Records

from .service import Service

log = logging.getLogger(__name__)


class Deadlines(Service):
    """Runs in every worker, for the jobs of all models. Running jobs are ended by the workers that hold them.

    It is separate from the reaper because the reaper pauses for one lease after the broker was unreachable, and deadlines must
    not wait for that.
    """

    def __init__(self, records: Records) -> None:
        super().__init__("deadlines")
        self._records = records

    def run_once(self) -> None:
        for job_id in self._records.end_overdue():
            log.info("job %s: its deadline passed while it was queued", job_id)
