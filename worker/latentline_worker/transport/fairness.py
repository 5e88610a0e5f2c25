"""In which order a worker looks into its queues, so that a tenant with many jobs does not delay one with few."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable

from latentline.routing import level_1_queue

REMEMBERED = 256  # messages after which about two thirds of a queue's count are forgotten


class HeldMessages:
    """How many messages of each shard this worker holds, of all levels together. Updated by the consumer and by task threads."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, queue: str) -> None:
        with self._lock:
            self._count[level_1_queue(queue)] += 1

    def end(self, queue: str) -> None:
        with self._lock:
            self._count[level_1_queue(queue)] -= 1

    def __getitem__(self, queue: str) -> int:
        return self._count[level_1_queue(queue)]


class LeastServedFirst:
    """The order of queues for kombu's BRPOP: the shard from which least was taken lately comes first, then its levels likewise.

    Replaces ``kombu.utils.scheduling.round_robin_cycle``, which would give a tenant with few jobs only every other turn.
    Queues that are equally busy alternate here as well.

    Args:
        held: the messages that this worker holds.
        max_per_queue: in-flight limit of the queues of one shard; the rest of the worker stays free for other tenants.
    """

    def __init__(self, held: HeldMessages, max_per_queue: int) -> None:
        self._held, self._max_per_queue = held, max_per_queue
        self._queues: list[str] = []
        self._taken: defaultdict[str, float] = defaultdict(float)  # per queue
        self._taken_of_shard: defaultdict[str, float] = defaultdict(float)  # per shard, which its queue of level 1 names
        self._weight = 1.0  # of the next message. Growing it equals exponential decay of the old ones.

    def update(self, queues: Iterable[str]) -> None:
        """Set the queues to choose from."""
        self._queues = list(queues)

    @property
    def capped(self) -> bool:
        """Whether some queue is at its in-flight limit, so that the usable queues change when a job ends."""
        return any(self._held[queue] >= self._max_per_queue for queue in self._queues)

    def consume(self, num: int) -> list[str]:
        """The first ``num`` queues of the order, without those that are at their in-flight limit."""
        usable = (queue for queue in self._queues if self._held[queue] < self._max_per_queue)
        return sorted(usable, key=lambda queue: (self._taken_of_shard[level_1_queue(queue)], self._taken[queue]))[:num]

    def rotate(self, last_used: str) -> str:
        """Count a message that was taken from this queue."""
        self._taken[last_used] += self._weight
        self._taken_of_shard[level_1_queue(last_used)] += self._weight
        self._weight *= 1 + 1 / REMEMBERED
        if self._weight > 1e9:
            for taken in (self._taken, self._taken_of_shard):
                for name in taken:
                    taken[name] /= self._weight
            self._weight = 1.0
        return last_used
