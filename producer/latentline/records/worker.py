"""Everything that worker processes do with records, on one object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from latentline import routing
from latentline.jobs import Announcement, JobRecord, ModelInfo
from latentline.models import Working
from latentline.scripts import ANNOUNCE, HEARTBEAT

from .dead import bury
from .driving import Operation, call_script, driven, pairs
from .fleet import ANNOUNCED_S, FORGOTTEN_S, WORKER_ALIVE_S, durability, up_s
from .held import HeldJobs
from .maintenance import Maintenance
from .outbox import Outbox
from .timeline import AttemptStory, attempts


class Records(HeldJobs, Maintenance, Outbox):
    """What workers and deliverers do with records, on a blocking client."""

    @driven
    def durability(self) -> Operation[list[str]]:
        """Sentences about settings of the broker that may lose jobs."""
        return durability()

    @driven
    def up_s(self) -> Operation[float]:
        """Seconds since the broker was started."""
        return up_s()

    @driven
    def announce(
        self, worker: str, models: Sequence[ModelInfo], cold: Sequence[str] = (), swaps: Mapping[str, int] | None = None
    ) -> Operation[None]:
        """Say that a worker is alive, on the broker's clock, and serves these models.

        Args:
            cold: the ids of those that are not in its memory now.
            swaps: how often it has loaded a model in the place of others, by the model's id.
        """
        said = Announcement(level=self.level, models=tuple(models), cold=tuple(cold), swaps=dict(swaps or {}))
        yield from call_script(
            ANNOUNCE,
            worker=worker,
            announcement=said.model_dump_json(),
            first_fields=json.dumps({info.id: info.first_fields() for info in models}),
            announced_s=ANNOUNCED_S,
            forgotten_s=FORGOTTEN_S,
        )

    @driven
    def heartbeat(self, worker: str, working: Working, models: Sequence[str] = ()) -> Operation[dict[str, float] | None]:
        """Say that a worker is alive, and what it does, and ask what waits.

        Returns:
            Of those of the models that have jobs which have not ended: for how many seconds the oldest of them has waited that this
            worker could take, 0 while none waits. None when the broker does not know the worker's announcement, for example
            after its data was wiped.
        """
        answer: list[str] = yield from call_script(
            HEARTBEAT,
            worker=worker,
            working=working.model_dump_json(),
            working_s=WORKER_ALIVE_S,
            models=json.dumps(list(models)),
            level=self.level,
        )
        if not answer:
            return None
        return {model: float(seconds) for model, seconds in pairs(answer[1:]).items()}

    @driven
    def worker_gone(self, name: str) -> Operation[None]:
        """Say that a worker has stopped."""
        yield lambda client: client.zrem(routing.workers_key(), name)

    @driven
    def attempts(self, record: JobRecord) -> Operation[list[AttemptStory]]:
        """Every attempt at a job as its events tell of it."""
        return attempts(record)

    @driven
    def bury(self, /, dead_id: str, kind: str, reason: str, **more: Any) -> Operation[None]:
        """Store a dead letter for something unreadable, with its cause."""
        return bury(dead_id, kind, reason, **more)
