"""The order in which a worker looks into its queues."""

from __future__ import annotations

from collections import Counter

from latentline_worker.transport.fairness import InFlight, LeastServedFirst


def take(turns: LeastServedFirst, filled: dict[str, int]) -> str:
    """What BRPOP does: the first queue in order that holds something."""
    queue = next(name for name in turns.consume(len(filled)) if filled[name])
    filled[queue] -= 1
    return turns.rotate(queue)


def turns_over(*queues: str) -> LeastServedFirst:
    turns = LeastServedFirst(InFlight(), most=4)
    turns.update(queues)
    return turns


def test_busy_queues_alternate() -> None:
    turns, filled = turns_over("a", "b"), {"a": 50, "b": 50}
    assert Counter(take(turns, filled) for _ in range(40)) == {"a": 20, "b": 20}


def test_a_queue_from_which_little_was_taken_goes_first() -> None:
    turns, filled = turns_over("busy", "quiet"), {"busy": 2000, "quiet": 0}
    for _ in range(1000):
        take(turns, filled)
    filled["quiet"] = 10
    assert [take(turns, filled) for _ in range(11)] == ["quiet"] * 10 + ["busy"]


def test_what_was_taken_long_ago_counts_little() -> None:
    turns, filled = turns_over("a", "b"), {"a": 10_000, "b": 10_000}
    filled["b"] = 0
    for _ in range(5000):
        take(turns, filled)
    filled["b"] = 5000
    taken = [take(turns, filled) for _ in range(2000)]
    assert taken[:100] == ["b"] * 100 and set(taken[-2:]) == {"a", "b"}, "its advantage is bounded"


def test_it_goes_on_for_ever() -> None:
    turns, filled = turns_over("a", "b"), {"a": 10**6, "b": 10**6}
    assert Counter(take(turns, filled) for _ in range(20_000)) == {"a": 10_000, "b": 10_000}


def test_a_queue_that_has_all_that_it_may_waits_and_leaves_places_to_others() -> None:
    in_flight = InFlight()
    turns = LeastServedFirst(in_flight, most=2)
    turns.update(["busy", "quiet"])
    in_flight.begin("busy")
    assert turns.consume(2) == ["busy", "quiet"]
    in_flight.begin("busy")
    assert turns.consume(2) == ["quiet"]
    in_flight.end("busy")
    assert turns.consume(2) == ["busy", "quiet"]
