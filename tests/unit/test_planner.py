"""The planner, with no model and no torch: requests are made of their numbers alone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from latentline_worker.engine.planner import AGEING, Planner
from latentline_worker.engine.request import Request, Work


def request(
    job_id: str, steps: int, *, images: int = 1, guided: bool = True, priority: int = 5, lane: tuple[int, int, int] = (4, 8, 8)
) -> Request:
    anything: Any = object()
    table: Any = SimpleNamespace(num_steps=steps)
    work = Work(job_id, lane, table, 5.0, tuple(range(images)), anything, anything if guided else None, priority)
    return Request(work)


def ids(chosen: list[Request]) -> list[str]:
    return [r.work.job_id for r in chosen]


def test_shortest_remaining_first() -> None:
    jobs = [request("long", 50), request("short", 4), request("middle", 20)]
    assert ids(Planner(4).select(jobs)) == ["short", "middle"]


def test_priority_comes_before_length() -> None:
    assert ids(Planner(2).select([request("short", 4), request("urgent", 50, priority=0)])) == ["urgent"]


def test_rows_are_the_budget_and_guidance_costs_two() -> None:
    jobs = [request("a", 1), request("b", 2, images=2), request("c", 3, guided=False), request("d", 4, guided=False)]
    # a: 2 rows, b: 4 do not fit beside it, c and d: one each.
    assert ids(Planner(4).select(jobs)) == ["a", "c", "d"]


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    assert ids(Planner(4).select([request("big", 3, images=8), request("small", 9)])) == ["big"]


def test_only_one_lane_shares_a_step() -> None:
    jobs = [request("a", 5), request("other", 6, lane=(4, 16, 16)), request("b", 7)]
    assert ids(Planner(16).select(jobs)) == ["a", "b"]


def test_ageing_lets_no_job_starve() -> None:
    """A long job among an endless stream of short ones runs after at most AGEING times its length."""
    long = request("long", 30)
    while long not in Planner(2).select([request("short", 4), long]):
        long.waited += 1
        assert long.waited <= AGEING * 30, "the long job starves"
    assert long.waited > 0, "it never had to wait: the test shows nothing"


def test_nothing_to_do() -> None:
    assert Planner(4).select([]) == []


def test_a_budget_below_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows: got 0"):
        Planner(0)


def test_planner_never_imports_torch() -> None:
    code = "import sys; import latentline_worker.engine.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
