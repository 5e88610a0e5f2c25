"""In which order a worker looks into its queues, so that a tenant with a thousand jobs holds up nobody with ten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

REMEMBERED = 256  # messages after which about two thirds of a take are forgotten


class LeastServedFirst:
    """The order of queues for kombu's BRPOP: first the one from which least was taken lately.

    Takes the place of ``kombu.utils.scheduling.round_robin_cycle``, which would give a tenant with few jobs every other
    place only. Queues that are equally busy alternate here as well.
    """

    def __init__(self, queues: Iterable[str] = ()) -> None:
        self._queues = list(queues)
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._weight = 1.0  # of the next take: growing it is the same as fading all earlier ones

    def update(self, queues: Iterable[str]) -> None:
        """These are the queues now."""
        self._queues = list(queues)

    def consume(self, num: int) -> list[str]:
        """The first ``num`` of the order."""
        return sorted(self._queues, key=self._taken.__getitem__)[:num]

    def rotate(self, last_used: str) -> str:
        """A message of this queue was taken."""
        self._taken[last_used] += self._weight
        self._weight *= 1 + 1 / REMEMBERED
        if self._weight > 1e9:
            for queue in self._taken:
                self._taken[queue] /= self._weight
            self._weight = 1.0
        return last_used
