"""In which order a worker looks into its queues, so that a tenant with many jobs does not delay one with few."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

REMEMBERED = 256  # messages after which about two thirds of a queue's count are forgotten


class HeldMessages:
    """How many messages of each queue this worker holds. Updated by the consumer and by task threads."""

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
    """The order of queues for kombu's BRPOP: the queue from which least was taken lately comes first.

    Replaces ``kombu.utils.scheduling.round_robin_cycle``, which would give a tenant with few jobs only every other turn.
    Queues that are equally busy alternate here as well.

    Args:
        held: the messages that this worker holds.
        max_per_queue: in-flight limit per queue; the rest of the worker stays free for other tenants.
    """

    def __init__(self, held: HeldMessages, max_per_queue: int) -> None:
        self._held, self._max_per_queue = held, max_per_queue
        self._queues: list[str] = []
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._weight = 1.0  # of the next message; letting it grow is the same as letting all earlier ones fade

    def update(self, queues: Iterable[str]) -> None:
        """Set the queues to choose from."""
        self._queues = list(queues)

    def consume(self, num: int) -> list[str]:
        """The first ``num`` queues of the order, without those that are at their in-flight limit."""
        return sorted((q for q in self._queues if self._held[q] < self._max_per_queue), key=self._taken.__getitem__)[:num]

    def rotate(self, last_used: str) -> str:
        """Count a message that was taken from this queue."""
        self._taken[last_used] += self._weight
        self._weight *= 1 + 1 / REMEMBERED
        if self._weight > 1e9:
            for queue in self._taken:
                self._taken[queue] /= self._weight
            self._weight = 1.0
        return last_used
