"""Which requests take part in the next denoise step. Torch-free: tested without a model, and run by ``benchmarks/simulate.py``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

from .cost import CostModel
from .tenants import TenantShares, Usage

# Every so many steps the oldest request goes first, whatever its length. This bounds the waiting time: from when its
# priority class is the most urgent one present, a job ends within OLDEST_EVERY x (its own steps + the steps that older
# jobs of its class still had to go) steps of the worker, whatever arrives after it.
OLDEST_EVERY = 4
# How much longer a step may take because jobs of tenants that are behind take part in it.
SLOWDOWN = 1.5


class Candidate(Usage, Protocol):
    """What the planner reads of a job in flight (``request.Request``), beside its tenant and rows."""

    @property
    def priority(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def lane(self) -> Hashable: ...
    @property
    def arrival(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Planner:
    """Orders requests by priority, then by their tenant's share, then those about to miss their deadline, then by the
    shortest remaining work, within the bound on waiting above.

    Args:
        cost: gives each lane's row budget and step time. A single request that needs more rows runs alone.
        clock: the time to which deadlines refer.
    """

    def __init__(self, cost: CostModel, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = cost
        self.shares = TenantShares()
        self._clock = clock
        self._turn = 0

    def select(self, requests: Sequence[C]) -> list[C]:
        """The requests of the next step, all of the same lane: that of the first request in the order."""
        if not requests:
            return []
        self._turn += 1
        wanted = Counter[str]()
        for request in requests:
            wanted[request.tenant] += request.rows
        behind = self.shares.behind(wanted)
        ranked = self._ranked(requests, behind)
        chosen = self._fill(self._head(ranked), ranked, behind)
        if len(wanted) > 1:  # Charge usage only under contention.
            self.shares.charge(chosen)
        return chosen

    def _ranked(self, requests: Sequence[C], behind: set[str]) -> list[C]:
        """The requests, the most urgent one first."""
        now = self._clock()
        row_s = {lane: self._row_seconds(lane) for lane in {r.lane for r in requests}}
        # A lane without measurements is assumed to be as fast as the fastest one, so that it gets measured.
        assumed = min((seconds for seconds in row_s.values() if seconds), default=1.0)
        return sorted(requests, key=lambda r: _urgency(r, row_s[r.lane] or assumed, now, r.tenant in behind))

    def _head(self, ranked: Sequence[C]) -> C:
        """The request that takes part in any case: the first one, or every few steps the oldest of the same priority."""
        head = ranked[0]
        if self._turn % OLDEST_EVERY == 0:
            return min((r for r in ranked if r.priority == head.priority), key=lambda r: r.arrival)
        return head

    def _fill(self, head: C, ranked: Sequence[C], behind: set[str]) -> list[C]:
        """The head, and those of its lane that fit into the lane's row budget."""
        budget = self.cost.budget(head.lane)
        chosen, rows = [head], head.rows
        first_rows = 0 if head.tenant in behind else head.rows  # rows of tenants that are not behind
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
        return chosen

    def _slows(self, lane: Hashable, first_rows: int, rows: int) -> bool:
        """Whether a step of ``rows`` rows takes too long for the tenants in front, who have ``first_rows`` of them."""
        return self.cost.seconds(lane, rows) > SLOWDOWN * self.cost.seconds(lane, first_rows)

    def _row_seconds(self, lane: Hashable) -> float:
        """What one row adds to a step; 0 while nothing is measured."""
        budget = self.cost.budget(lane)
        return self.cost.seconds(lane, budget) / budget


def _urgency(request: Candidate, row_s: float, now: float, behind: bool) -> tuple[int, bool, float, float, int]:
    """A key to sort by: the most urgent request has the smallest."""
    work_s = request.remaining * request.rows * row_s
    pressing = float("inf")
    if request.deadline is not None:
        slack_s = request.deadline - now - work_s
        # It can still meet its deadline, and could not after waiting for as long as its own work takes.
        if 0 <= slack_s < work_s:
            pressing = request.deadline
    return request.priority, behind, pressing, work_s, request.arrival
