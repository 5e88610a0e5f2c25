"""In which order a worker looks into its queues, so that a tenant with many jobs does not delay one with few."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from latentline.routing import level_1_queue

AVERAGED = 16  # about so many messages count in the mean time for which one is held
REMEMBERED = 256  # messages after which about two thirds of a queue's count are forgotten


class HeldMessages:
    """How many messages of each shard this worker holds, of all levels together, and how long it holds one.

    Updated by the consumer and by task threads.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # message id -> when it was received
        self._mean_s: float | None = None
        self.changed = threading.Condition()
        """Held for every change, and notified when a message has ended."""

    def begin(self, queue: str, message_id: str) -> None:
        with self.changed:
            self._count[level_1_queue(queue)] += 1
            self._since[message_id] = self._clock()

    def end(self, queue: str, message_id: str) -> None:
        with self.changed:
            self._count[level_1_queue(queue)] -= 1
            now = self._clock()
            took_s = now - self._since.pop(message_id, now)
            self._mean_s = took_s if self._mean_s is None else self._mean_s + (took_s - self._mean_s) / AVERAGED
            self.changed.notify_all()

    @property
    def mean_s(self) -> float | None:
        """How long messages were held lately, in seconds; None before the first has ended."""
        return self._mean_s

    def __getitem__(self, queue: str) -> int:
        return self._count[level_1_queue(queue)]


class Choice(Protocol):
    """Which of its queues a worker waits at."""

    @property
    def changing(self) -> bool: ...

    def choose(self, queues: Sequence[str]) -> list[str]: ...


class LeastServedFirst:
    """The order of queues for kombu's BRPOP: the shard from which least was taken lately comes first, then its levels likewise.

    Replaces ``kombu.utils.scheduling.round_robin_cycle``, which would give a tenant with few jobs only every other turn.
    Queues that are equally busy alternate here as well.

    Args:
        held: the messages that this worker holds.
        max_per_queue: in-flight limit of the queues of one shard; the rest of the worker stays free for other tenants.
        choice: which queues count now, and whether that is about to change; by default all do.
    """

    def __init__(self, held: HeldMessages, max_per_queue: int, choice: Choice | None = None) -> None:
        self._held, self._max_per_queue, self._choice = held, max_per_queue, choice
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

    @property
    def changing(self) -> bool:
        """Whether other queues are about to count."""
        return self._choice is not None and self._choice.changing

    @property
    def mean_held_s(self) -> float | None:
        """How long messages were held lately, in seconds; None before the first has ended."""
        return self._held.mean_s

    def consume(self, num: int) -> list[str]:
        """The first ``num`` queues of the order, without those that are at their in-flight limit."""
        queues = self._choice.choose(self._queues) if self._choice else self._queues
        usable = (queue for queue in queues if self._held[queue] < self._max_per_queue)
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
