"""The cost model: which number of rows it settles on for which machine. Seconds are made up, never measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from latentline_worker.engine.cost import ENOUGH_THROUGHPUT, LOOK_AGAIN, RECOVERY, SAMPLES, TRUSTED, CostModel

LANE = "lane"
MAX_ROWS = 64


def affine(rows: int) -> float:
    """A device with a fixed price per step: rows fill it up."""
    return 0.010 + 0.001 * rows


def flat(rows: int) -> float:
    """A device that a single row fills: throughput is the same at any size."""
    return 0.020 * rows


def explore(cost: CostModel, curve: Callable[[int], float], steps: int = 60) -> list[int]:
    """The budgets of that many steps, each observed as the curve says."""
    budgets = []
    for _ in range(steps):
        budgets.append(cost.budget(LANE))
        cost.observe(LANE, budgets[-1], curve(budgets[-1]))
    return budgets


def test_a_limit_below_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows: got 0; allowed: at least 1"):
        CostModel(0)


def test_a_new_lane_starts_at_one_row() -> None:
    cost = CostModel(MAX_ROWS)
    assert (cost.budget(LANE), cost.limit(LANE), cost.seconds(LANE, 5)) == (1, MAX_ROWS, 0.0)


def test_exploration_doubles_after_trusted_times_at_each_size() -> None:
    budgets = explore(CostModel(MAX_ROWS), affine, 7 * TRUSTED)
    assert budgets == [rows for rows in (1, 2, 4, 8, 16, 32, 64) for _ in range(TRUSTED)]


def test_exploration_ends_at_the_most_rows_that_are_allowed() -> None:
    assert max(explore(CostModel(6), lambda rows: 1.0)) == 6


def test_an_affine_curve_settles_on_the_knee() -> None:
    def curve(rows: int) -> float:
        return max(0.080, 0.010 * rows)  # free up to 8 rows, then in proportion

    budgets = explore(CostModel(MAX_ROWS), curve)
    assert budgets[-1] == 8
    assert max(budgets) == 16, "one size beyond the knee is what it takes to see it"


def test_the_knee_is_the_fewest_rows_that_reach_the_worthwhile_share_of_the_best_throughput() -> None:
    cost = CostModel(1024)
    explore(cost, affine, 20 * TRUSTED)
    rows = cost.budget(LANE)
    best = 1 / 0.001  # rows per second in the limit
    assert rows / affine(rows) >= ENOUGH_THROUGHPUT**2 * best
    assert rows < 1024, "ever more rows bring ever less"


def test_a_flat_throughput_curve_stays_at_one_row() -> None:
    budgets = explore(CostModel(MAX_ROWS), flat)
    assert budgets[-1] == 1
    assert max(budgets) == 2


def test_a_falling_throughput_curve_stays_at_one_row() -> None:
    assert explore(CostModel(MAX_ROWS), lambda rows: 0.02 * rows**1.5)[-1] == 1


def test_row_counts_between_the_doublings_are_used_where_they_are_known() -> None:
    cost = CostModel(MAX_ROWS)
    for rows, seconds in [(1, 0.080), (2, 0.080), (4, 0.080), (6, 0.080), (8, 0.107), (16, 0.214)]:
        for _ in range(TRUSTED):
            cost.observe(LANE, rows, seconds)
    assert cost.budget(LANE) == 6


def test_one_disturbed_step_changes_nothing() -> None:
    def curve(rows: int) -> float:
        return max(0.080, 0.010 * rows)

    cost = CostModel(MAX_ROWS)
    explore(cost, curve)
    seconds = cost.seconds(LANE, 8)
    cost.observe(LANE, 8, 60.0)
    assert (cost.budget(LANE), cost.seconds(LANE, 8)) == (8, seconds)


def test_a_disturbed_step_while_exploring_changes_nothing() -> None:
    cost = CostModel(MAX_ROWS)
    cost.observe(LANE, 1, 60.0)
    assert explore(cost, affine)[-1] == explore(CostModel(MAX_ROWS), affine)[-1]


def test_times_that_are_not_trusted_yet_do_not_move_the_budget() -> None:
    cost = CostModel(MAX_ROWS)
    for _ in range(TRUSTED - 1):
        cost.observe(LANE, 16, 0.001)
        assert cost.budget(LANE) == 1


def test_a_device_that_becomes_slower_is_learned_anew() -> None:
    cost = CostModel(MAX_ROWS)
    explore(cost, affine)
    for _ in range(SAMPLES):
        cost.observe(LANE, 8, 5.0)
    assert cost.seconds(LANE, 8) == 5.0


def test_larger_batches_get_another_chance_every_so_often() -> None:
    cost = CostModel(MAX_ROWS)
    explore(cost, flat, LOOK_AGAIN)
    assert explore(cost, affine, 3)[:TRUSTED] == [2] * TRUSTED, "the look happens"
    assert explore(cost, affine, 10 * LOOK_AGAIN)[-1] > 1, "and what it finds counts"


def test_another_look_that_finds_nothing_changes_nothing() -> None:
    cost = CostModel(MAX_ROWS)
    budgets = explore(cost, flat, 2 * LOOK_AGAIN + 10)
    assert budgets[-1] == 1
    assert budgets[10:].count(2) == 2 * TRUSTED


def test_another_look_keeps_within_the_limit() -> None:
    cost = CostModel(MAX_ROWS)
    cost.cap(LANE, 8)
    assert max(explore(cost, lambda rows: 1.0, LOOK_AGAIN + 10)) == 8


def test_lowering_takes_effect_at_once_and_never_raises() -> None:
    cost = CostModel(MAX_ROWS)
    explore(cost, affine)
    cost.lower(LANE, 5)
    assert (cost.budget(LANE), cost.limit(LANE)) == (5, 5)
    cost.lower(LANE, 20)
    assert cost.limit(LANE) == 5
    cost.lower(LANE, 0)
    assert cost.limit(LANE) == 1


def test_a_lowered_limit_doubles_after_steps_without_trouble() -> None:
    cost = CostModel(MAX_ROWS)
    cost.lower(LANE, 5)
    limits = []
    for _ in range(5):
        explore(cost, affine, RECOVERY - 1)
        limits.append(cost.limit(LANE))
        explore(cost, affine, 1)
    assert (limits, cost.limit(LANE)) == ([5, 10, 20, 40, 64], 64)


def test_another_shortage_starts_the_recovery_over() -> None:
    cost = CostModel(MAX_ROWS)
    cost.lower(LANE, 5)
    explore(cost, affine, RECOVERY - 1)
    cost.lower(LANE, 5)
    explore(cost, affine, RECOVERY - 1)
    assert cost.limit(LANE) == 5


def test_a_cap_is_never_exceeded_by_recovery() -> None:
    cost = CostModel(MAX_ROWS)
    cost.cap(LANE, 12)
    cost.lower(LANE, 5)
    budgets = explore(cost, lambda rows: 1.0, 4 * RECOVERY)
    assert (max(budgets), cost.limit(LANE)) == (12, 12)


def test_a_cap_after_shortage_keeps_the_lower_limit() -> None:
    cost = CostModel(MAX_ROWS)
    cost.lower(LANE, 5)
    cost.cap(LANE, 12)
    assert cost.limit(LANE) == 5


def test_lanes_learn_by_themselves() -> None:
    cost = CostModel(MAX_ROWS)
    explore(cost, affine)
    cost.lower(LANE, 3)
    assert (cost.budget("other"), cost.limit("other"), cost.seconds("other", 4)) == (1, MAX_ROWS, 0.0)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [(1, 2.0), (2, 2.0), (3, 2.5), (4, 3.0), (6, 5.0), (8, 7.0), (16, 14.0)],
    ids=["below", "known", "between", "known too", "between too", "largest", "beyond"],
)
def test_seconds_are_a_straight_line_between_what_is_known_and_proportional_beyond(rows: int, seconds: float) -> None:
    cost = CostModel(MAX_ROWS)
    for known_rows, known_s in [(2, 2.0), (4, 3.0), (8, 7.0)]:
        cost.observe(LANE, known_rows, known_s)
    assert cost.seconds(LANE, rows) == pytest.approx(seconds)


def test_the_best_step_of_each_measured_lane_is_told() -> None:
    model = CostModel(16)
    assert model.best() == {}
    for rows, seconds in ((1, 0.1), (4, 0.2), (8, 0.5)):
        model.observe("a", rows, seconds)
    assert model.best() == {}, "the times are not sorted yet"
    model.seconds("a", 4)
    assert model.best() == {"a": (3, 4, 0.2)}
