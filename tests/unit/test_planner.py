"""The planner, with no model and no torch: candidates are their numbers alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import pytest

from latentline_worker.engine import planner as module
from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.planner import OLDEST_EVERY, Planner
from latentline_worker.engine.tenants import TenantShares


@dataclass(eq=False)
class Candidate:
    """What the planner reads of a request, and a name to recognise it."""

    name: str
    remaining: int
    arrival: int = 0
    rows: int = 2  # one guided image
    priority: int = 5
    deadline: float | None = None
    lane: Hashable = "lane"
    tenant: str = "default"


class Fixed(CostModel):
    """Always the same budget, whatever is observed."""

    def budget(self, lane: Hashable) -> int:
        return self.max_rows


def planner(budget: int, clock: Callable[[], float] = lambda: 0.0) -> Planner:
    return Planner(Fixed(budget), clock)


def names(chosen: list[Candidate]) -> list[str]:
    return [candidate.name for candidate in chosen]


class ByLane(CostModel):
    """A budget for each lane."""

    def __init__(self, budgets: dict[Hashable, int]) -> None:
        super().__init__(max(budgets.values()))
        self._budgets = budgets

    def budget(self, lane: Hashable) -> int:
        return self._budgets[lane]


@pytest.mark.parametrize(("budgets", "chosen"), [((2, 8), 1), ((8, 2), 4)], ids=["small and large", "large and small"])
def test_a_step_has_the_row_budget_of_its_own_lane(budgets: tuple[int, int], chosen: int) -> None:
    jobs = [Candidate(f"other {i}", 20 + i, lane="other") for i in range(4)] + [
        Candidate(f"first {i}", 5 + i, lane="first") for i in range(4)
    ]
    cost = ByLane({"first": budgets[0], "other": budgets[1]})
    assert names(Planner(cost, lambda: 0.0).select(jobs)) == [f"first {i}" for i in range(chosen)]


def test_nothing_to_do_selects_nothing() -> None:
    assert planner(4).select([]) == []


def test_the_shortest_remaining_work_goes_first() -> None:
    jobs = [Candidate("long", 50), Candidate("short", 4), Candidate("middle", 20)]
    assert names(planner(4).select(jobs)) == ["short", "middle"]


def test_work_is_steps_times_rows() -> None:
    assert names(planner(4).select([Candidate("four images", 6, rows=4), Candidate("one image", 20, rows=1)])) == ["one image"]


def test_equal_work_goes_in_order_of_arrival() -> None:
    assert names(planner(2).select([Candidate("later", 5, arrival=2), Candidate("earlier", 5, arrival=1)])) == ["earlier"]


def test_priority_comes_before_length() -> None:
    assert names(planner(2).select([Candidate("short", 4), Candidate("urgent", 50, priority=0)])) == ["urgent"]


def test_an_urgent_job_preempts_at_the_next_step() -> None:
    plan = planner(2)
    running = Candidate("running", 10)
    assert names(plan.select([running])) == ["running"]
    running.remaining -= 1
    assert names(plan.select([running, Candidate("urgent", 50, arrival=1, priority=0)])) == ["urgent"]


def test_less_urgent_jobs_fill_the_rows_that_are_left() -> None:
    assert names(planner(4).select([Candidate("patient", 3, priority=9), Candidate("urgent", 50, priority=0)])) == ["urgent", "patient"]


def test_rows_are_the_budget_and_guidance_costs_two() -> None:
    jobs = [
        Candidate("guided", 1),
        Candidate("two guided", 2, rows=4),
        Candidate("plain", 5, rows=1),
        Candidate("other plain", 9, rows=1),
    ]
    # The first takes 2 of 4 rows; the second's 4 do not fit beside it; one row each for the others.
    assert names(planner(4).select(jobs)) == ["guided", "plain", "other plain"]


def test_a_full_batch_takes_no_more() -> None:
    assert names(planner(4).select([Candidate(str(i), 1 + i) for i in range(5)])) == ["0", "1"]


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    assert names(planner(4).select([Candidate("big", 1, rows=16), Candidate("small", 90, rows=1)])) == ["big"]


def test_only_one_lane_takes_part_in_a_step() -> None:
    jobs = [Candidate("a", 5), Candidate("other", 6, lane="wide"), Candidate("b", 7)]
    assert names(planner(16).select(jobs)) == ["a", "b"]


def test_lanes_are_compared_by_what_their_rows_cost() -> None:
    cost = CostModel(1)
    cost.observe("large", 1, 8.0)
    cost.observe("small", 1, 1.0)
    jobs = [Candidate("few large steps", 3, rows=1, lane="large"), Candidate("many small steps", 20, rows=1, lane="small")]
    assert names(Planner(cost, lambda: 0.0).select(jobs)) == ["many small steps"]


@pytest.mark.parametrize("row_s", [0.001, 60.0], ids=["quick", "slow"])
def test_a_lane_of_which_nothing_is_known_is_compared_by_steps_and_rows(row_s: float) -> None:
    cost = CostModel(1)
    cost.observe("known", 1, row_s)
    jobs = [Candidate("known", 40, rows=1, lane="known"), Candidate("new", 4, arrival=1, rows=1, lane="new")]
    assert names(Planner(cost, lambda: 0.0).select(jobs)) == ["new"]
    jobs = [Candidate("known", 4, rows=1, lane="known"), Candidate("new", 40, arrival=1, rows=1, lane="new")]
    assert names(Planner(cost, lambda: 0.0).select(jobs)) == ["known"]


@pytest.mark.parametrize(
    ("deadline", "first"),
    [(112.0, "late"), (110.0, "late"), (109.0, "short"), (125.0, "short"), (None, "short")],
    ids=["presses", "just enough time", "hopeless", "time to spare", "no deadline"],
)
def test_a_job_is_hurried_while_its_deadline_presses_and_can_be_met(deadline: float | None, first: str) -> None:
    """Ten steps of a second each, at 100 s."""
    jobs = [Candidate("short", 2, rows=1), Candidate("late", 10, arrival=1, rows=1, deadline=deadline)]
    assert names(planner(1, lambda: 100.0).select(jobs)) == [first]


def test_the_step_time_that_was_measured_decides_whether_a_deadline_presses() -> None:
    jobs = [Candidate("short", 2, rows=1), Candidate("late", 10, arrival=1, rows=1, deadline=112.0)]
    quick = CostModel(1)
    quick.observe("lane", 1, 0.01)  # 0.1 s of work and 12 s to go: no hurry
    assert names(Planner(quick, lambda: 100.0).select(jobs)) == ["short"]


def test_the_earliest_of_the_pressing_deadlines_goes_first() -> None:
    jobs = [Candidate("second", 8, rows=1, deadline=13.0), Candidate("first", 10, rows=1, deadline=12.0)]
    assert names(planner(1).select(jobs)) == ["first"]


def test_a_deadline_does_not_pass_a_more_urgent_priority() -> None:
    jobs = [Candidate("late", 10, rows=1, deadline=11.0), Candidate("urgent", 50, rows=1, priority=0)]
    assert names(planner(1).select(jobs)) == ["urgent"]


def test_the_oldest_goes_first_every_few_steps() -> None:
    plan = planner(2)
    jobs = [Candidate("old", 90), Candidate("short", 4, arrival=1)]
    firsts = [names(plan.select(jobs))[0] for _ in range(3 * OLDEST_EVERY)]
    assert firsts == (["short"] * (OLDEST_EVERY - 1) + ["old"]) * 3


def test_the_oldest_of_a_less_urgent_priority_waits() -> None:
    plan = planner(2)
    jobs = [Candidate("patient", 90, priority=9), Candidate("urgent", 4, arrival=1)]
    assert {names(plan.select(jobs))[0] for _ in range(3 * OLDEST_EVERY)} == {"urgent"}


def steps_until_done(plan: Planner, watched: list[Candidate], others: Callable[[int], list[Candidate]]) -> int:
    """Steps that the planner takes to finish these jobs beside whatever others are there at each step."""
    for step in range(1, 10_000):
        for job in plan.select([*(job for job in watched if job.remaining), *others(step)]):
            job.remaining -= 1
        if not any(job.remaining for job in watched):
            return step
    raise AssertionError("never")


def test_a_tenant_that_has_used_less_goes_first() -> None:
    plan = planner(2)
    busy = [Candidate(f"busy {i}", 10, i, tenant="busy") for i in range(50)]
    for _ in range(20):
        for job in plan.select([job for job in busy if job.remaining]):
            job.remaining -= 1
    quiet = [Candidate("quiet", 30, 100, tenant="quiet")]
    # Every so many steps the oldest job of all has its turn, and no more than that.
    assert steps_until_done(plan, quiet, lambda _: [job for job in busy if job.remaining]) <= 30 * OLDEST_EVERY / (OLDEST_EVERY - 1) + 1


class Proportional(Fixed):
    """A step takes a second a row: batching gains nothing."""

    def seconds(self, lane: Hashable, rows: int) -> float:
        return float(rows)


class Flat(Fixed):
    """A step takes a second, whatever is in it."""

    def seconds(self, lane: Hashable, rows: int) -> float:
        return 1.0


@pytest.mark.parametrize(("cost", "most_busy_rows"), [(Proportional(64), 4), (Flat(64), 56)])
def test_a_busy_tenant_slows_another_by_half_at_most_and_fills_what_costs_nothing(cost: CostModel, most_busy_rows: int) -> None:
    plan = Planner(cost, lambda: 0.0)
    busy = [Candidate(f"busy {i}", 1000, i, tenant="busy") for i in range(100)]
    for _ in range(10):
        plan.select(busy)
    quiet = [Candidate(f"quiet {i}", 10, 1000, tenant="quiet") for i in range(4)]
    for _ in range(20):
        rows = Counter[str]()
        for job in plan.select([*busy, *quiet]):
            rows[job.tenant] += job.rows
        assert (rows["quiet"], rows["busy"]) == (8, most_busy_rows)


def test_no_tenant_gets_much_more_than_its_share_of_what_several_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose jobs are always the shortest would get everything; without the turns of the oldest, to see the share alone."""
    monkeypatch.setattr(module, "OLDEST_EVERY", 10**9)
    plan = planner(2)
    jobs = [Candidate(f"{tenant} {i}", steps, i, tenant=tenant) for i in range(400) for tenant, steps in (("short", 2), ("long", 40))]
    done = Counter[str]()
    for _ in range(600):
        for job in plan.select([job for job in jobs if job.remaining]):
            job.remaining -= 1
            done[job.tenant] += 1
    assert 0.7 <= done["short"] / done.total() <= 0.8, done


def test_a_tenant_that_wants_exactly_the_mean_is_not_behind() -> None:
    """Three tenants want 2, 4 and 6 rows. The mean is 4."""
    assert TenantShares().behind({"little": 2, "mean": 4, "much": 6}) == {"much"}
    assert TenantShares().behind({"one": 4, "other": 4}) == set()


def test_a_tenant_that_had_exactly_half_as_much_again_as_its_share_is_not_behind() -> None:
    """Of 8 rows an equal share is 4, and half as much again is 6."""
    shares = TenantShares()
    shares.charge([Candidate("", 1, rows=6, tenant="much"), Candidate("", 1, rows=2, tenant="little")])
    assert shares.behind({"much": 2, "little": 2}) == set()
    shares = TenantShares()
    shares.charge([Candidate("", 1, rows=7, tenant="much"), Candidate("", 1, rows=1, tenant="little")])
    assert shares.behind({"much": 2, "little": 2}) == {"much"}


def test_a_tenant_over_its_share_is_behind_one_that_wants_more_than_the_mean() -> None:
    shares = TenantShares()
    shares.charge([Candidate("", 1, rows=9, tenant="had much")])
    assert shares.behind({"had much": 2, "wants much": 8}) == {"had much"}


def test_usage_is_charged_only_under_contention() -> None:
    plan = planner(2)
    for _ in range(50):
        plan.select([Candidate("a", 5, tenant="alone")])
    assert len(plan.shares) == 0
    plan.select([Candidate("a", 5, tenant="alone"), Candidate("b", 9, tenant="other")])
    assert len(plan.shares) == 1


def test_one_tenant_alone_is_never_over_its_share() -> None:
    plan = planner(2)
    for _ in range(100):
        plan.select([Candidate("a", 5)])
    assert names(plan.select([Candidate("long", 50), Candidate("short", 4)])) == ["short"]


def test_tenants_that_left_are_forgotten() -> None:
    plan = planner(2)
    for i in range(5000):
        plan.select([Candidate("a", 5, tenant=str(i))])
    assert len(plan.shares) < 1000


@dataclass
class Bound:
    """A job's bound on waiting, from the turn on from which it holds."""

    since: int
    turns: int


class Worker:
    """Steps jobs as the planner says, while an adversary keeps adding jobs of classes that never pass the most urgent one present."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turn = 0
        self.jobs: list[Candidate] = []
        self.bounds: dict[Candidate, Bound] = {}
        self.num_arrived = self.num_bounded = 0
        self.planner = planner(self.random.choice([1, 2, 4, 8, 16]), lambda: float(self.turn))

    def add(self, priority: int, steps: int) -> Candidate:
        job = Candidate(
            str(self.num_arrived),
            steps,
            self.num_arrived,
            rows=self.random.choice([1, 2, 2, 4, 16]),
            priority=priority,
            deadline=self.turn + self.random.uniform(1, 80) if self.random.random() < 0.3 else None,
            lane=self.random.choice(["narrow", "wide"]),
            tenant=self.random.choice(["one", "two", "three"]),
        )
        self.num_arrived += 1
        self.jobs.append(job)
        return job

    def attack(self) -> None:
        """Short jobs, many with pressing deadlines: all that ranks before a long one."""
        most_urgent = min(job.priority for job in self.jobs) if self.jobs else 9
        for _ in range(self.random.randint(1, 3)):
            self.add(self.random.choice([p for p in (3, 5, 7, 9) if p >= most_urgent]), self.random.randint(1, 3))

    def step(self) -> None:
        most_urgent = min(job.priority for job in self.jobs)
        for job in self.jobs:
            if job.priority == most_urgent and job not in self.bounds:
                older = sum(o.remaining for o in self.jobs if o.priority == job.priority and o.arrival < job.arrival)
                self.bounds[job] = Bound(self.turn, OLDEST_EVERY * (job.remaining + older))
        self.turn += 1
        for job in self.planner.select(self.jobs):
            job.remaining -= 1
        self.jobs = [job for job in self.jobs if job.remaining]
        for job, bound in list(self.bounds.items()):
            waited = self.turn - bound.since
            assert waited <= bound.turns if not job.remaining else waited < bound.turns, f"{job} waits for {waited} turns: {bound}"
            if not job.remaining:
                del self.bounds[job]
                self.num_bounded += 1


@pytest.mark.parametrize("seed", range(12))
def test_no_job_waits_longer_than_the_stated_bound_whatever_keeps_arriving(seed: int) -> None:
    worker = Worker(seed)
    for _ in range(6):
        worker.add(worker.random.choice([3, 5, 5]), worker.random.randint(1, 40))
    for _ in range(400):
        worker.attack()
        worker.step()
    assert worker.num_bounded > 50, "hardly a job was bounded: the test shows nothing"


def test_without_the_oldest_rule_the_same_attack_starves_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds because of the rule, not because the scenario is harmless."""

    def turns_of_a_long_job() -> int:
        plan, long = planner(2), Candidate("long", 20)
        for turn in range(1, 1000):
            for job in plan.select([long, Candidate("short", 1, arrival=turn)]):
                job.remaining -= 1
            if not long.remaining:
                return turn
        return 1000

    assert turns_of_a_long_job() <= OLDEST_EVERY * 20
    monkeypatch.setattr(module, "OLDEST_EVERY", 10**9)
    assert turns_of_a_long_job() == 1000


def test_the_planner_never_imports_torch() -> None:
    code = "import sys; from latentline_worker.engine import cost, planner, tenants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
