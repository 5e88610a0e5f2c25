"""Notices adapters that are added to or removed from the places where a worker's adapters come from, while it runs."""

from __future__ import annotations

import logging

from latentline.errors import LatentlineError
from latentline_worker.maintenance.service import JITTER, Service

from .roster import Roster

log = logging.getLogger(__name__)

RESCAN_S = 15.0  # a look at a folder reads its entries, and only new or changed files


class Rescans(Service):
    """Looks for adapters of the models in memory; what has changed goes with the next announcement.

    A model that is cold is looked at when it is loaded.
    """

    def __init__(self, roster: Roster) -> None:
        super().__init__("rescans", RESCAN_S, JITTER)
        self._roster = roster

    def run_once(self) -> None:
        for family in self._roster.families():
            adapters = family.adapters
            if adapters is None:
                continue
            before = set(adapters.names)
            try:
                changed = adapters.rescan()
            except LatentlineError as error:
                log.warning("%s: its adapters cannot be looked for: %s", family.info.id, error.message)
                continue
            if changed:
                came, went = sorted(set(adapters.names) - before), sorted(before - set(adapters.names))
                log.info("%s: adapters that came: %s; that went: %s", family.info.id, ", ".join(came) or "-", ", ".join(went) or "-")
                self._roster.has_adapters(family.info.id, adapters.names)
