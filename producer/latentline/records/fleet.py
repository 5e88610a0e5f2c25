"""Who serves what, and whether the broker keeps it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

from latentline import routing
from latentline.errors import InvalidRequest, LatentlineError, NoWorker
from latentline.jobs import Announcement, JobRequest, Message, ModelInfo, Submission, resolve
from latentline.models import ServedModel, common, level_of

from .driving import Operation

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
Outcomes = Sequence[Submission | LatentlineError]
_unreadable: set[str] = set()  # workers and models whose announcement was logged as unreadable

WORKER_ALIVE_S = 10  # a worker whose last heartbeat is older than this is gone
FORGOTTEN_S = 3600  # workers that have been silent for this long are removed from the list
CACHED_S = 1.0  # how long submissions may be checked against announcements that were read before
ANNOUNCED_S = 60  # how long an announcement holds: longer than most restarts, so that a rolling update refuses no submission
NOBODY = "a model that a worker serves (none has announced one yet)"


@dataclass(frozen=True)
class Fleet:
    """What the workers serve now.

    ``offers`` holds what is announced of each model, as (level, info), beginning with the one whose defaults count.
    ``known`` holds every model that any worker has announced since the broker's data was created.
    ``announcements`` holds what each live worker says of itself.
    """

    offers: Mapping[str, tuple[tuple[int, ModelInfo], ...]]
    known: tuple[str, ...]
    announcements: tuple[Announcement, ...] = ()

    def models(self) -> dict[str, ModelInfo]:
        """Every model that is served, with what all of its workers of the highest level allow."""
        newest = {model_id: max(level for level, _ in offers) for model_id, offers in self.offers.items()}
        return {model_id: common([info for level, info in offers if level == newest[model_id]]) for model_id, offers in self.offers.items()}

    def served(self) -> dict[str, ServedModel]:
        """The same, with how many workers serve each model and have it in memory."""
        served = {}
        for model_id, info in self.models().items():
            here = [one for one in self.announcements if any(model.id == model_id for model in one.models)]
            served[model_id] = ServedModel(
                **dict(info),
                workers=len(self.offers[model_id]),
                warm=len(self.offers[model_id]) - sum(model_id in one.cold for one in here),
                swaps=sum(one.swaps.get(model_id, 0) for one in here),
            )
        return served

    def accept(self, request: JobRequest) -> Submission:
        """The request with what the client left to the model.

        Raises:
            InvalidRequest: the model is not served, it cannot do this, or all of its workers are too old for it.
            NoWorker: the model is known, and none of its workers has been heard of lately.
        """
        offers = self.offers.get(request.model)
        if not offers:
            if request.model in self.known:
                raise NoWorker(f"no worker that serves {request.model!r} has been heard of for {ANNOUNCED_S} s; try again later")
            raise InvalidRequest("model", request.model, f"one of: {', '.join(self.offers)}" if self.offers else NOBODY)
        able = _able(request, offers, *level_of(request))
        submission = resolve(request, common([info for _, info in able]))
        # A default of the model may ask for more than what the client sent.
        still_able = _able(request, able, submission.level, submission.level_field)
        return submission if len(still_able) == len(able) else resolve(request, common([info for _, info in still_able]))


def _able(request: JobRequest, offers: tuple[tuple[int, ModelInfo], ...], level: int, field: str) -> tuple[tuple[int, ModelInfo], ...]:
    """The offers of workers that can read a request of this level."""
    able = tuple(offer for offer in offers if offer[0] >= level)
    if not able:
        newest = max(offered for offered, _ in offers)
        allowed = f"what the workers of {request.model!r} know: they have level {newest}, this needs level {level}"
        if field == "loras":
            allowed = f"none: no worker of {request.model!r} has adapters"
        if field == "scheduler":
            allowed = f"one of: {', '.join(common([info for _, info in offers]).schedulers)}"
        raise InvalidRequest(field, request.model_dump(mode="json").get(field.partition(".")[0]), allowed)
    return able


def fleet() -> Operation[Fleet]:
    """What the workers serve now, in one round trip."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.zrange(routing.announced_at_key(), 0, -1, withscores=True)
        pipeline.hgetall(routing.announced_key())
        pipeline.hgetall(routing.models_key())
        pipeline.zrange(routing.workers_key(), 0, -1, withscores=True)
        return pipeline.execute()

    (seconds, _), announced_at, announced, first, beats = yield call
    offers: dict[str, list[tuple[int, ModelInfo]]] = {}
    announcements = []
    for name, at in announced_at:
        if at > seconds - ANNOUNCED_S and (announcement := read_announced(Announcement, f"worker {name}", announced.get(name))):
            announcements.append(announcement)
            for info in announcement.models:
                offers.setdefault(info.id, []).append((announcement.level, info))
    # Workers of version 0.1.0 announce into one hash without names. Its models are served while one of them is alive.
    if any(at > seconds - WORKER_ALIVE_S and name not in announced for name, at in beats):
        for model_id, text in first.items():
            if model_id not in offers and (old := read_announced(ModelInfo, f"model {model_id}", text)):
                offers[model_id] = [(1, old)]
    # In an order that does not depend on who announced last: the defaults must not change while nothing changes.
    ordered = {
        key: tuple(sorted(found, key=lambda offer: (-offer[0], offer[1].model_dump_json()))) for key, found in sorted(offers.items())
    }
    return Fleet(ordered, tuple(first), tuple(announcements))


class CachedFleet:
    """The fleet as one client knows it: read again when it is older than ``CACHED_S``.

    Threads and tasks may share it: each sees some fleet that was read lately, and at worst several of them read it at once.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read: tuple[float, Fleet] | None = None

    def accept_many(self, accept: Callable[[Fleet], Outcomes]) -> Operation[Outcomes]:
        """What ``accept`` makes of the fleet. Before anything is refused the fleet is read afresh: a worker may just have come."""
        now = self._clock()
        if self._read and now - self._read[0] < CACHED_S:
            outcomes = accept(self._read[1])
            if not any(isinstance(outcome, LatentlineError) for outcome in outcomes):
                return outcomes
        read = yield from fleet()
        self._read = (now, read)
        return accept(read)


def read_announced(kind: type[M], whose: str, text: str | None) -> M | None:
    """An announcement; None for one that cannot be read, which must not break the submissions for other models."""
    if not text:
        return None
    try:
        read = kind.model_validate_json(text)
    except ValueError as error:
        if whose not in _unreadable:  # announcements are read at each submission
            log.warning("the announcement of %s cannot be read: %s", whose, type(error).__name__)
        _unreadable.add(whose)
        return None
    _unreadable.discard(whose)
    return read


def models() -> Operation[dict[str, ModelInfo]]:
    """Every model that is served now, with what all of its workers of the highest level allow."""
    return (yield from fleet()).models()


def served() -> Operation[dict[str, ServedModel]]:
    """The same, with how many workers serve each model and have it in memory."""
    return (yield from fleet()).served()


def workers() -> Operation[list[str]]:
    """Names of the workers whose heartbeat was seen lately."""
    seconds, _ = yield lambda client: client.time()
    names: list[str] = yield lambda client: client.zrangebyscore(routing.workers_key(), seconds - WORKER_ALIVE_S, "+inf")
    return names


def up_s() -> Operation[float]:
    """Whole seconds since the broker was started; infinite when this user may not ask."""
    try:
        found: dict[str, float] = yield lambda client: client.info("server")
    except redis.ResponseError:
        return float("inf")
    return found["uptime_in_seconds"]


def durability() -> Operation[list[str]]:
    """Sentences about settings of the broker that may lose jobs; empty when there are none."""
    try:
        found: dict[str, str] = yield lambda client: client.config_get("appendonly", "maxmemory-policy", "maxmemory")
    except redis.ResponseError:
        return ["the broker does not let its settings be read: whether jobs survive its restart is not known"]
    problems = []
    if found.get("appendonly") != "yes":
        problems.append("appendonly is off: a restart of the broker loses jobs")
    if found.get("maxmemory-policy") != "noeviction":
        problems.append(f"maxmemory-policy is {found.get('maxmemory-policy')}: under pressure the broker drops records; set noeviction")
    if found.get("maxmemory") in (None, "0"):
        problems.append("maxmemory is not set: the broker may be killed for memory instead of refusing jobs")
    return problems
