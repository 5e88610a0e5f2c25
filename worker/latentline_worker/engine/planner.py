"""Who takes part in the next denoise step. Torch-free: tested with no model, and run by ``benchmarks/simulate.py``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

from .cost import CostModel

# Every so many steps the oldest job goes first, however long it is. The bound that follows: from when its priority
# class is the most urgent one present, a job ends within OLDEST_EVERY x (its own steps + the steps that older jobs
# of its class still had to go) steps of the worker, whatever arrives after it.
OLDEST_EVERY = 4
# Steps after which about two thirds of a tenant's use are forgotten, and how much of an equal share a tenant may have used
# before its jobs come after others'.
REMEMBERED, MOST_OF_SHARE = 256, 1.5
# How much longer a step may take for the tenants that go first because jobs of those behind them are in it as well.
SLOWDOWN = 1.5


class Candidate(Protocol):
    """What the planner needs to know of a job in flight (``request.Request``)."""

    @property
    def priority(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def lane(self) -> Hashable: ...
    @property
    def arrival(self) -> int: ...
    @property
    def tenant(self) -> str: ...


C = TypeVar("C", bound=Candidate)


class Planner:
    """Priority first; then the tenants that ask for little, what would miss its deadline, the shortest remaining work; with
    the bound above.

    A tenant comes behind the others while it has more rows in flight than an equal part, or when it has had half as much
    again as its share of what several wanted. With one tenant, or with equal ones, this changes nothing.

    Args:
        cost: gives each lane's row budget and step time. A single request that needs more rows runs alone.
        clock: the time to which deadlines refer.
    """

    def __init__(self, cost: CostModel, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = cost
        self._clock = clock
        self._turn = 0
        self._used: dict[str, float] = {}  # tenant -> rows of steps that several wanted, the older the less

    def select(self, requests: Sequence[C]) -> list[C]:
        """The requests of the next step: all of one lane, the most urgent request's own."""
        if not requests:
            return []
        self._turn += 1
        now = self._clock()
        row_s = {lane: self._row_seconds(lane) for lane in {r.lane for r in requests}}
        hopeful = min((seconds for seconds in row_s.values() if seconds), default=1.0)  # of a lane that nothing is known of
        row_s = {lane: seconds or hopeful for lane, seconds in row_s.items()}
        wanted = Counter[str]()
        for request in requests:
            wanted[request.tenant] += request.rows
        behind = self._behind(wanted)
        ranked = sorted(requests, key=lambda r: self._urgency(r, row_s[r.lane], now, r.tenant in behind))
        head = ranked[0]
        if self._turn % OLDEST_EVERY == 0:
            head = min((r for r in ranked if r.priority == head.priority), key=lambda r: r.arrival)
        budget = self.cost.budget(head.lane)
        chosen, rows, first_rows = [head], head.rows, 0 if head.tenant in behind else head.rows
        for request in ranked:
            if rows >= budget:
                break
            if request is head or request.lane != head.lane or rows + request.rows > budget:
                continue
            if request.tenant not in behind:
                first_rows += request.rows
            elif first_rows and self._slows(head.lane, first_rows, rows + request.rows):
                continue
            chosen.append(request)
            rows += request.rows
        if len(wanted) > 1:  # what nobody else wanted is nobody's loss
            self._charge(chosen)
        return chosen

    def _behind(self, wanted: dict[str, int]) -> set[str]:
        """The tenants whose jobs come after the others', from the rows that each has in flight."""
        even = sum(wanted.values()) / len(wanted)
        share = sum(self._used.get(tenant, 0.0) for tenant in wanted) / len(wanted)
        place = {
            tenant: 2 if self._used.get(tenant, 0.0) > MOST_OF_SHARE * share else 1 if rows > even else 0 for tenant, rows in wanted.items()
        }
        return {tenant for tenant in wanted if place[tenant] > min(place.values())}

    def _slows(self, lane: Hashable, first_rows: int, rows: int) -> bool:
        """Whether a step of so many rows takes too long for those that go first, who have so many of them."""
        return self.cost.seconds(lane, rows) > SLOWDOWN * self.cost.seconds(lane, first_rows)

    def _charge(self, chosen: Sequence[C]) -> None:
        self._used = {tenant: kept for tenant, used in self._used.items() if (kept := used * (1 - 1 / REMEMBERED)) > 1}
        for request in chosen:
            self._used[request.tenant] = self._used.get(request.tenant, 0.0) + request.rows

    def _row_seconds(self, lane: Hashable) -> float:
        """What one row adds to a step; 0 while nothing is known."""
        budget = self.cost.budget(lane)
        return self.cost.seconds(lane, budget) / budget

    @staticmethod
    def _urgency(request: Candidate, row_s: float, now: float, behind: bool) -> tuple[int, bool, float, float, int]:
        work_s = request.remaining * request.rows * row_s
        pressing = float("inf")
        if request.deadline is not None:
            slack_s = request.deadline - now - work_s
            # Could still make it, and would not if it waited for as long again as it needs.
            if 0 <= slack_s < work_s:
                pressing = request.deadline
        return request.priority, behind, pressing, work_s, request.arrival
