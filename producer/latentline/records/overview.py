"""The fleet at a glance: workers, queues, dead letters. At most three round trips, whatever waits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from latentline import routing
from latentline.jobs import Announcement, ModelInfo, Status
from latentline.models import Working

from .driving import Operation
from .fleet import WORKER_ALIVE_S, read_announced

LOOKED_AT = 500  # of the oldest queued jobs: their tenants and ages are told
LETTERS = 50  # of the newest dead letters


@dataclass(frozen=True)
class WorkerSeen:
    name: str
    heard_s: float
    """Seconds since its last heartbeat."""
    models: tuple[str, ...]
    working: Working | None
    """None for a worker of an earlier version, and for one that has just started."""


@dataclass(frozen=True)
class Waiting:
    """Queued jobs of one tenant and model, among the ``LOOKED_AT`` oldest."""

    model: str
    tenant: str
    jobs: int
    oldest_s: float


@dataclass(frozen=True)
class Overview:
    now: float
    """Unix seconds on the broker's clock."""
    workers: tuple[WorkerSeen, ...]
    running: int
    queued: int
    queued_by_model: dict[str, int]
    """Of every model that is served or has queued jobs among the oldest."""
    waiting: tuple[Waiting, ...]
    letters: tuple[dict[str, Any], ...]
    num_letters: int


def overview() -> Operation[Overview]:
    """What the fleet does now."""

    def first(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.zrange(routing.workers_key(), 0, -1, withscores=True)
        pipeline.hgetall(routing.announced_key())
        pipeline.zcard(routing.index_key(Status.RUNNING))
        pipeline.zcard(routing.index_key(Status.QUEUED))
        pipeline.zrange(routing.index_key(Status.QUEUED), 0, LOOKED_AT - 1)
        pipeline.zcard(routing.dead_times_key())
        pipeline.zrange(routing.dead_times_key(), 0, LETTERS - 1, desc=True)
        return pipeline.execute()

    (seconds, micros), beats, announced, running, queued, oldest, num_letters, dead_ids = yield first
    now = seconds + micros / 1e6
    served = sorted({info.id for name, text in announced.items() for info in _announced(name, text)})
    alive = [(name, now - at) for name, at in beats if at > now - WORKER_ALIVE_S]

    def second(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for model in served:
            pipeline.zcard(routing.waiting_key(model))
        for name, _ in alive:
            pipeline.get(routing.working_key(name))
        for job_id in oldest:
            pipeline.hmget(routing.job_key(job_id), "model", "tenant", "created_at")
        for dead_id in dead_ids:
            pipeline.hget(routing.dead_key(), dead_id)
        return pipeline.execute()

    found = iter((yield second) if served or alive or oldest or dead_ids else [])
    depths = {model: next(found) for model in served}
    workers = [_seen(name, heard_s, announced.get(name), next(found)) for name, heard_s in alive]
    waiting = _grouped(now, [next(found) for _ in oldest])
    for model in {group.model for group in waiting} - depths.keys():  # its workers have been silent for long
        depths[model] = sum(group.jobs for group in waiting if group.model == model)
    return Overview(
        now,
        tuple(sorted(workers, key=lambda worker: worker.name)),
        running,
        queued,
        depths,
        waiting,
        tuple(json.loads(letter) for letter in found if letter),
        num_letters,
    )


def _seen(name: str, heard_s: float, announced: str | None, state: str | None) -> WorkerSeen:
    models = tuple(info.id for info in _announced(name, announced))
    return WorkerSeen(name, max(0.0, heard_s), models, read_announced(Working, f"worker {name}", state))


def _announced(name: str, text: str | None) -> tuple[ModelInfo, ...]:
    announcement = read_announced(Announcement, f"worker {name}", text)
    return announcement.models if announcement else ()


def _grouped(now: float, jobs: list[list[str | None]]) -> tuple[Waiting, ...]:
    """By model and tenant, the longest waiting first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for model, tenant, created_at in jobs:
        if model and created_at:  # else it ended between the two round trips and is forgotten
            groups.setdefault((model, tenant or "default"), []).append(max(0.0, now - float(created_at)))
    waiting = [Waiting(model, tenant, len(ages), max(ages)) for (model, tenant), ages in groups.items()]
    return tuple(sorted(waiting, key=lambda group: -group.oldest_s))
