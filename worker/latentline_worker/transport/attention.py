"""At which of its queues a worker waits: those of the models that it has in memory, and as few of these as idle models need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from latentline.routing import NUM_SHARDS, PRIORITY_STEPS, queue_name, queue_names

from .fairness import HeldMessages

# Lists of quiet models in one BRPOP: so many names take 0.4 KB a second of an idle worker.
QUIET_LISTS = 16


class Attention:
    """Chooses among a worker's queues. Any thread may change the choice; the consumer asks for it before each wait at the broker.

    Of a model that is closed, no queue. Of one that is busy, all: it has jobs that have not ended, here or on any worker. Of one that
    is quiet, the queues of its first shard: the first tenant with a job gets that shard (``submit.lua``), and when its message comes
    the model is busy. Of the quiet models those that were used last, up to ``QUIET_LISTS`` lists; the others become busy
    with the next heartbeat, which tells which models have jobs.

    Args:
        models: their ids; all are closed at first.
        level: up to which this worker reads queues.
    """

    def __init__(self, models: Iterable[str], level: int) -> None:
        self.held = HeldMessages()
        self._models = {model: set(queue_names(model, level)) for model in models}
        self._first = {model: {queue_name(model, 0, one) for one in range(1, level + 1)} for model in self._models}
        self._lists = level * len(PRIORITY_STEPS)  # of one shard of a model
        self._open: dict[str, int] = {}  # those used last come first; how many waits had begun when each was opened
        self._num_waits = 0
        self._busy: set[str] = set()
        self._asked: set[str] = set()  # the models of which the newest wait at the broker has queues
        self.changing = False
        """Whether models are being exchanged, so that a wait at the broker should be short."""

    def open(self, model: str) -> None:
        """Wait at this model's queues from the next time on."""
        with self.held.changed:
            self._open = {model: self._num_waits, **self._open}

    def close(self, model: str) -> None:
        """Wait at this model's queues no more; a wait that has begun goes on, see :meth:`drained`."""
        with self.held.changed:
            self._open.pop(model, None)

    def busy(self, models: Collection[str]) -> None:
        """These models have jobs that have not ended, and no others."""
        with self.held.changed:
            self._busy = set(models)

    def num_held(self, model: str) -> int:
        """Messages of a model that this worker holds."""
        return sum(self.held[queue_name(model, shard)] for shard in range(NUM_SHARDS))

    def used(self, model: str) -> None:
        """A job of this model has begun."""
        with self.held.changed:
            if model in self._open:
                self._open = {model: self._open[model], **self._open}

    def reached(self, model: str) -> bool:
        """Whether a wait at the broker has begun since this model was opened, so that the jobs that wait for it could come."""
        return self._num_waits > self._open.get(model, self._num_waits)

    def drained(self, model: str, wait_s: float) -> bool:
        """Whether no message of a closed model is held and none can come any more; waits for that up to ``wait_s`` seconds."""
        with self.held.changed:
            return self.held.changed.wait_for(lambda: model not in self._asked and not self.num_held(model), wait_s)

    def choose(self, queues: Sequence[str]) -> list[str]:
        """Those of the queues at which to wait now."""
        with self.held.changed:
            wanted: set[str] = set()
            asked: set[str] = set()
            left = QUIET_LISTS
            for model in self._open:
                busy = model in self._busy or self.num_held(model) > 0
                if not busy and left < self._lists and asked:
                    continue
                left -= 0 if busy else self._lists
                asked.add(model)
                wanted |= self._models[model] if busy else self._first[model]
            self._asked = asked
            self._num_waits += 1
            self.held.changed.notify_all()
            return [queue for queue in queues if queue in wanted]
