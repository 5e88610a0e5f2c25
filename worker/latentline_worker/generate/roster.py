"""The models of a worker process: which are in memory, which jobs use them, and which one goes when another is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from latentline.models import LEVEL, ModelInfo, level_of_worker
from latentline_worker.engine.request import Cancelled
from latentline_worker.models.base import Family
from latentline_worker.transport.attention import Attention

FIRST_RETRY_S, MAX_RETRY_S = 10.0, 600.0  # after a model could not be loaded


class Said(NamedTuple):
    """What a worker announces of its models."""

    models: tuple[ModelInfo, ...]
    cold: tuple[str, ...]
    swaps: dict[str, int]


@dataclass
class Member:
    """A model that this worker serves."""

    info: ModelInfo
    num_bytes: int  # of its weights
    family: Family | None  # while it is in memory
    moved_at: float  # when it came into memory, or left it
    used_at: float  # when a job of it last began or ended
    takes_adapters: bool = False  # whether there is a place where its adapters come from
    users: int = 0  # jobs that use it now
    load_s: float = 0.0  # how long it took to load, the last time
    swaps: int = 0  # how often it was loaded in the place of others
    failures: int = field(default=0, repr=False)  # to load it, since it was last in memory
    retry_at: float = float("-inf")


class Roster:
    """Which models a worker serves and which of them are in memory. Any thread may use it.

    A model that is in memory is warm, any other is cold. A cold one is due once a job has waited for ``cold_wait_s`` seconds, and
    the model itself has been cold for as long: so jobs are left to workers where it is warm. A warm one stays for as long, and for the
    time that loading it took.

    Args:
        members: at least one, by id.
        budget: bytes that the weights in memory may take together.
        cold_wait_s: how long jobs wait for other workers before a cold model is due here.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        budget: float = float("inf"),
        cold_wait_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members, self._budget, self.cold_wait_s, self._clock = dict(members), budget, cold_wait_s, clock
        # A model that takes adapters may have none yet; its worker reads the queues of jobs with adapters all the same.
        takes = [LEVEL for member in self._members.values() if member.takes_adapters]
        self.level = max([*takes, *(level_of_worker(member.info) for member in self._members.values())])
        self.attention = Attention(self._members, self.level)
        self._lock = threading.Lock()
        for model, member in self._members.items():
            if member.family is not None:
                self.attention.open(model)

    @classmethod
    def of(cls, families: Iterable[Family]) -> Roster:
        """Models that stay in memory."""
        now = time.monotonic()
        return cls({family.info.id: Member(family.info, 0, family, now, now, family.adapters is not None) for family in families})

    @property
    def ids(self) -> list[str]:
        return list(self._members)

    @property
    def all_fit(self) -> bool:
        """Whether all models may be in memory together."""
        return sum(member.num_bytes for member in self._members.values()) <= self._budget

    def said(self) -> Said:
        """What to announce now."""
        with self._lock:
            members = self._members.values()
            return Said(
                models=tuple(member.info for member in members),
                cold=tuple(member.info.id for member in members if member.family is None),
                swaps={member.info.id: member.swaps for member in members if member.swaps},
            )

    @contextmanager
    def use(self, model: str) -> Iterator[Family]:
        """A model, which stays in memory during the block.

        Raises:
            KeyError: this worker does not serve it.
            Cancelled: it is cold. Its queues are not read then, so that is rare.
        """
        with self._lock:
            member = self._members[model]
            family = member.family
            if family is None:
                raise Cancelled("cold")
            member.users += 1
            member.used_at = self._clock()
        self.attention.used(model)
        try:
            yield family
        finally:
            del family  # its weights must not stay because of a generator that is still referenced
            with self._lock:
                member.users -= 1
                member.used_at = self._clock()

    def families(self) -> list[Family]:
        """Those in memory. The caller must not keep them: a model that leaves stays in memory for as long."""
        with self._lock:
            return [member.family for member in self._members.values() if member.family is not None]

    def has_adapters(self, model: str, names: tuple[str, ...]) -> None:
        """Jobs may name these adapters of a model from now on."""
        with self._lock:
            member = self._members[model]
            member.info = member.info.model_copy(update={"loras": names})
            if member.family is not None:
                member.family.info = member.info

    def due(self, waits: Mapping[str, float]) -> str | None:
        """The cold model that is to be loaded now: of those that are due, the one for which a job has waited for longest.

        Args:
            waits: for how many seconds the oldest job of a model has waited.
        """
        with self._lock:
            now = self._clock()
            due = [
                (waits[model], model)
                for model, member in self._members.items()
                if member.family is None
                and waits.get(model, 0.0) >= self.cold_wait_s
                and now - member.moved_at >= self.cold_wait_s
                and now >= member.retry_at
            ]
        return max(due)[1] if due else None

    def victims(self, model: str) -> Sequence[str] | None:
        """Which models have to go so that this one fits: those without jobs that were used least recently, then those with jobs
        that have been in memory for longest. None while those that could go have not been there for long enough.
        """
        with self._lock:
            warm = [one for one in self._members.values() if one.family is not None]
            over = sum(one.num_bytes for one in warm) + self._members[model].num_bytes - self._budget
            chosen = []
            for one in sorted(filter(self._may_go, warm), key=self._order):
                if over <= 0:
                    break
                chosen.append(one.info.id)
                over -= one.num_bytes
        return chosen if over <= 0 else None

    def _may_go(self, member: Member) -> bool:
        """Whether a model has had the time to take the jobs that waited for it. If it went sooner, models could take turns without
        doing any; as it is, loading takes half of the time at most.
        """
        stay_s = max(self.cold_wait_s, member.load_s)
        return self.attention.reached(member.info.id) and self._clock() - member.moved_at >= stay_s

    def _order(self, member: Member) -> tuple[bool, float]:
        busy = member.users > 0 or self.attention.num_held(member.info.id) > 0
        return busy, member.moved_at if busy else member.used_at

    def take_out(self, model: str) -> bool:
        """Make a model cold, unless jobs use it; whether it is cold now."""
        with self._lock:
            member = self._members[model]
            if member.users:
                return False
            member.family, member.moved_at = None, self._clock()
        return True

    def put_in(self, model: str, family: Family, num_bytes: int, load_s: float = 0.0, *, swapped: bool) -> None:
        """Make a model warm, which took ``load_s`` seconds; ``swapped`` if another one had to go for it."""
        with self._lock:
            member = self._members[model]
            member.family, member.info, member.num_bytes = family, family.info, num_bytes
            member.moved_at = member.used_at = self._clock()
            member.swaps += swapped
            member.load_s = load_s
            member.failures = 0
        self.attention.open(model)

    def failed(self, model: str) -> float:
        """Note that a model could not be loaded; in how many seconds it may be tried again."""
        with self._lock:
            member = self._members[model]
            pause_s: float = min(FIRST_RETRY_S * 2**member.failures, MAX_RETRY_S)
            member.failures += 1
            member.retry_at = self._clock() + pause_s
        return pause_s
