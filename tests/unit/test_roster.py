"""Which models are in memory, which is due, and which has to go for it. On a clock of the test's own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.families import OddFamily

from latentline.errors import LatentlineError, StoreUnavailable
from latentline.models import LEVEL
from latentline.routing import queue_name
from latentline_worker.engine.request import Cancelled
from latentline_worker.generate.rescans import Rescans
from latentline_worker.generate.roster import FIRST_RETRY_S, MAX_RETRY_S, Member, Roster

WAIT_S = 5.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def roster_of(clock: Clock, warm: str, cold: str = "", budget: float = 2, **sizes: int) -> Roster:
    """Models of one letter each, a byte large where nothing else is said."""
    members = {}
    for name in warm + cold:
        family: Any = OddFamily(name)
        members[name] = Member(family.info, sizes.get(name, 1), family if name in warm else None, clock.now, clock.now)
    roster = Roster(members, budget, WAIT_S, clock)
    wait_once(roster)
    clock.now += WAIT_S
    return roster


def wait_once(roster: Roster) -> None:
    """Begin a wait at the broker, as the consumer does."""
    roster.attention.choose([])


def test_a_cold_model_is_due_once_a_job_and_the_model_itself_have_waited(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "cd")
    clock.now -= 0.1
    assert roster.due({"c": 60.0}) is None, "it has only just become cold"
    clock.now += 0.1
    assert roster.due({"c": WAIT_S - 0.1}) is None
    assert roster.due({"a": 60.0, "b": 60.0}) is None, "those are in memory"
    assert roster.due({"c": WAIT_S, "d": WAIT_S + 1}) == "d", "the job that has waited for longest counts"


def test_the_model_that_was_used_least_recently_goes(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "c")
    clock.now += 1
    with roster.use("a"):
        clock.now += 1
    assert roster.victims("c") == ["b"]
    clock.now += 1
    with roster.use("b"):
        pass
    assert roster.victims("c") == ["a"]


def test_a_model_with_running_jobs_goes_last_and_only_once_they_have_ended(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "c")
    with roster.use("a"):
        clock.now += 1
        with roster.use("b"):
            pass
        assert roster.victims("c") == ["b"], "it was used last, but has no jobs"
        assert not roster.take_out("a")
        with roster.use("b"):
            assert roster.victims("c") == ["a"], "of those with jobs the one that has been there for longest: nothing starves"
    assert roster.take_out("a")
    with pytest.raises(Cancelled, match="cold"), roster.use("a"):
        pass


def test_a_model_stays_until_it_could_take_jobs_and_for_as_long_as_its_loading_took(clock: Clock) -> None:
    """Else models that take longer to load than jobs wait would take turns without doing any job."""
    roster = roster_of(clock, "a", "b", budget=1)
    assert roster.victims("b") == ["a"] and roster.take_out("a")
    roster.put_in("b", OddFamily("b"), 1, load_s=3 * WAIT_S, swapped=True)
    clock.now += WAIT_S
    assert roster.due({"a": 60.0}) == "a" and roster.victims("a") is None
    clock.now += 2 * WAIT_S
    assert roster.victims("a") is None, "no wait at the broker has begun since it came"
    wait_once(roster)
    assert roster.victims("a") == ["b"]


def test_messages_that_are_held_count_as_jobs(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "c")
    roster.attention.held.begin(queue_name("a", 3), "1")
    assert roster.victims("c") == ["b"]


def test_as_many_go_as_the_new_one_needs(clock: Clock) -> None:
    roster = roster_of(clock, "abd", "ce", budget=4, c=3, e=1)
    assert roster.victims("c") == ["a", "b"]
    assert roster.victims("e") == []


def test_what_is_announced_tells_of_cold_models_and_swaps(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "c")
    assert not roster.all_fit
    before = roster.said()
    assert ([info.id for info in before.models], before.cold, before.swaps) == (["a", "b", "c"], ("c",), {})
    assert roster.take_out("a")
    family: Any = OddFamily("c")
    roster.put_in("c", family, 1, swapped=True)
    assert (roster.said().cold, roster.said().swaps) == (("a",), {"c": 1})
    assert roster.said() == roster.said() != before
    with roster.use("c") as used:
        assert used is family


def test_a_model_that_cannot_be_loaded_is_tried_ever_less_often(clock: Clock) -> None:
    roster = roster_of(clock, "ab", "c")
    pauses = [roster.failed("c") for _ in range(9)]
    assert pauses[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S] and pauses[-1] == MAX_RETRY_S
    clock.now += MAX_RETRY_S - 1
    assert roster.due({"c": 1e6}) is None
    clock.now += 1
    assert roster.due({"c": 1e6}) == "c"
    roster.put_in("c", OddFamily("c"), 1, swapped=False)
    assert roster.failed("c") == FIRST_RETRY_S, "it was in memory since"


def test_models_that_stay_all_fit(clock: Clock) -> None:
    roster = Roster.of([OddFamily("a"), OddFamily("b")])
    assert roster.all_fit and roster.said().cold == () and roster.ids == ["a", "b"]


class Adapters:
    """Of which a test says what is there."""

    def __init__(self, *names: str) -> None:
        self.names, self.there = names, names
        self.problem: LatentlineError | None = None

    def rescan(self) -> bool:
        if self.problem:
            raise self.problem
        before, self.names = self.names, self.there
        return self.names != before


def test_adapters_that_come_and_go_are_announced(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    family: Any = OddFamily("a")
    family.adapters = Adapters()
    roster = Roster.of([family, OddFamily("b")])
    assert roster.level == LEVEL, "it reads the queues of jobs with adapters before there is one"
    rescans, before = Rescans(roster), roster.said()
    rescans.run_once()
    assert roster.said() == before
    family.adapters.there = ("oil", "ink")
    with caplog.at_level(logging.INFO):
        rescans.run_once()
    assert "a: adapters that came: ink, oil; that went: -" in caplog.text
    assert [info.loras for info in roster.said().models] == [("oil", "ink"), ()] and family.info.loras == ("oil", "ink")
    family.adapters.problem = StoreUnavailable("the store is away")
    rescans.run_once()
    assert "a: its adapters cannot be looked for: the store is away" in caplog.text and roster.said().models[0].loras == ("oil", "ink")
    family.adapters.problem, family.adapters.there = None, ("ink",)
    rescans.run_once()
    assert roster.said().models[0].loras == ("ink",)
