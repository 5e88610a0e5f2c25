"""Ends queued jobs at their deadline, whether or not a worker could take them."""

from __future__ import annotations

import logging

from latentline.records import MAX_OVERDUE, Records

log = logging.getLogger(__name__)


class Deadlines:
    """For the jobs of all models. Running jobs are ended by the workers that hold them."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def end_overdue(self) -> None:
        """End all that are overdue now, in several calls if they are many: each call holds up the broker for a moment only."""
        full = True
        while full:
            ended = self._records.end_overdue()
            for job_id in ended:
                log.info("job %s: its deadline passed while it was queued", job_id)
            full = len(ended) >= MAX_OVERDUE
