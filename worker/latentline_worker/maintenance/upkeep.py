"""What the workers of the same models do in turns: end overdue jobs, take jobs from lost workers, wake waiting jobs again."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import redis

from latentline.errors import LatentlineError
from latentline.records import Records

from .deadlines import Deadlines
from .reaper import Reaper
from .turns import TURN_S, Turns

log = logging.getLogger(__name__)


class Upkeep(Turns):
    """Runs in every worker; one worker of those that serve the same models at a time has the turn.

    A worker whose reaper is paused must not take the turn of one that may reclaim. It competes for another key, under which it
    ends overdue jobs, since deadlines must not wait, and neither reclaims nor wakes.

    Args:
        worker: the name of this worker.
        models: those that it serves.
    """

    def __init__(self, records: Records, worker: str, models: Sequence[str], reaper: Reaper, deadlines: Deadlines) -> None:
        super().__init__("upkeep")
        self._records, self._worker, self._reaper, self._deadlines = records, worker, reaper, deadlines
        self._duties = ",".join(sorted(models))

    def take_turn(self) -> bool:
        duties = f"paused:{self._duties}" if self._reaper.paused else self._duties
        try:
            return self._records.take_turn(duties, self._worker, TURN_S)
        except LatentlineError:  # whatever the broker answers: if no turn can be taken, no lease can be renewed
            self._reaper.broker_lost()
            raise

    def do_turn(self) -> None:
        """All duties once, each whether or not those before it failed.

        Raises:
            LatentlineError: the last of their failures.
        """
        failure: LatentlineError | None = None
        for duty in (self._deadlines.end_overdue, self._reaper.reclaim, self._reaper.wake):
            try:
                duty()
            except LatentlineError as error:
                failure = error
                # An error that the broker answered concerns this duty alone, such as wake-ups at the memory bound.
                if not isinstance(error.__cause__, redis.ResponseError):
                    self._reaper.broker_lost()
            except Exception:
                log.exception("%s: a duty failed", self._name)
        if failure:
            raise failure
