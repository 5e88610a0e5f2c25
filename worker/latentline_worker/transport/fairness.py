"""In which order a worker looks into its queues, so that a tenant with a thousand jobs holds up nobody with ten."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

REMEMBERED = 256  # messages after which about two thirds of a take are forgotten


class InFlight:
    """How many messages of each queue are in this worker's hands. Told by the consumer and by task threads."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, queue: str) -> None:
        with self._lock:
            self._count[queue] += 1

    def end(self, queue: str) -> None:
        with self._lock:
            self._count[queue] -= 1

    def __getitem__(self, queue: str) -> int:
        return self._count[queue]


class LeastServedFirst:
    """The order of queues for kombu's BRPOP: first the one from which least was taken lately.

    Takes the place of ``kombu.utils.scheduling.round_robin_cycle``, which would give a tenant with few jobs every other
    place only. Queues that are equally busy alternate here as well.

    Args:
        in_flight: what is being worked on.
        most: of one queue at a time; as many as are there already are left to wait, so that others find a place at once.
    """

    def __init__(self, in_flight: InFlight, most: int) -> None:
        self._in_flight, self._most = in_flight, most
        self._queues: list[str] = []
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._weight = 1.0  # of the next take: growing it is the same as fading all earlier ones

    def update(self, queues: Iterable[str]) -> None:
        """These are the queues now."""
        self._queues = list(queues)

    def consume(self, num: int) -> list[str]:
        """The first ``num`` of the order, without those that have to wait."""
        return sorted((q for q in self._queues if self._in_flight[q] < self._most), key=self._taken.__getitem__)[:num]

    def rotate(self, last_used: str) -> str:
        """A message of this queue was taken."""
        self._taken[last_used] += self._weight
        self._weight *= 1 + 1 / REMEMBERED
        if self._weight > 1e9:
            for queue in self._taken:
                self._taken[queue] /= self._weight
            self._weight = 1.0
        return last_used
