"""The order in which a worker looks into its queues."""

from __future__ import annotations

from collections import Counter

import pytest

from latentline import routing
from latentline_worker.transport.fairness import HeldMessages, LeastServedFirst


def take(order: LeastServedFirst, filled: dict[str, int]) -> str:
    """What BRPOP does: take from the first queue in order that is not empty."""
    queue = next(name for name in order.consume(len(filled)) if filled[name])
    filled[queue] -= 1
    return order.rotate(queue)


def order_of(*queues: str) -> LeastServedFirst:
    order = LeastServedFirst(HeldMessages(), max_per_queue=4)
    order.update(queues)
    return order


def test_busy_queues_alternate() -> None:
    order, filled = order_of("a", "b"), {"a": 50, "b": 50}
    assert Counter(take(order, filled) for _ in range(40)) == {"a": 20, "b": 20}


def test_a_queue_from_which_little_was_taken_goes_first() -> None:
    order, filled = order_of("busy", "quiet"), {"busy": 2000, "quiet": 0}
    for _ in range(1000):
        take(order, filled)
    filled["quiet"] = 10
    assert [take(order, filled) for _ in range(11)] == ["quiet"] * 10 + ["busy"]


def test_what_was_taken_long_ago_counts_little() -> None:
    order, filled = order_of("a", "b"), {"a": 10_000, "b": 10_000}
    filled["b"] = 0
    for _ in range(5000):
        take(order, filled)
    filled["b"] = 5000
    taken = [take(order, filled) for _ in range(2000)]
    assert taken[:100] == ["b"] * 100 and set(taken[-2:]) == {"a", "b"}, "the advantage of a queue that was idle is bounded"


def test_weights_do_not_overflow() -> None:
    order, filled = order_of("a", "b"), {"a": 10**6, "b": 10**6}
    assert Counter(take(order, filled) for _ in range(20_000)) == {"a": 10_000, "b": 10_000}


def test_a_queue_at_its_in_flight_limit_waits_and_leaves_room_for_others() -> None:
    held = HeldMessages()
    order = LeastServedFirst(held, max_per_queue=2)
    order.update(["busy", "quiet"])
    held.begin("busy", "id")
    assert order.consume(2) == ["busy", "quiet"]
    held.begin("busy", "id")
    assert order.consume(2) == ["quiet"]
    held.end("busy", "id")
    assert order.consume(2) == ["busy", "quiet"]


def test_queues_of_several_levels_share_the_limit_of_their_shard() -> None:
    """A tenant's jobs of a model lie in one shard at every level, and its limit is that of a tenant."""
    old, new, other = (routing.queue_name("m", shard, level) for shard, level in ((3, 1), (3, 2), (4, 2)))
    held = HeldMessages()
    order = LeastServedFirst(held, max_per_queue=2)
    order.update([old, new, other])
    held.begin(old, "1")
    held.begin(new, "2")
    assert order.consume(3) == [other]
    held.end(new, "2")
    assert set(order.consume(3)) == {old, new, other}


def test_a_tenant_with_jobs_of_two_levels_gets_no_second_turn() -> None:
    old, new, other = (routing.queue_name("m", shard, level) for shard, level in ((3, 1), (3, 2), (4, 1)))
    order, filled = order_of(old, new, other), {old: 50, new: 50, other: 50}
    assert Counter(take(order, filled) for _ in range(40)) == {old: 10, new: 10, other: 20}


def test_a_shard_at_its_limit_caps_the_order_and_all_of_its_queues() -> None:
    old, new, other = (routing.queue_name("m", shard, level) for shard, level in ((3, 1), (3, 2), (4, 1)))
    held = HeldMessages()
    order = LeastServedFirst(held, max_per_queue=1)
    order.update([old, new, other])
    assert not order.capped
    held.begin(new, "1")
    assert order.capped and order.consume(3) == [other]
    held.end(new, "1")
    assert not order.capped


def test_how_long_messages_are_held_is_averaged_over_the_last_ones() -> None:
    now = [0.0]
    held = HeldMessages(lambda: now[0])
    assert held.mean_s is None

    def hold(seconds: float) -> None:
        held.begin("a", "1")
        now[0] += seconds
        held.end("a", "1")

    hold(4)
    assert held.mean_s == 4
    for _ in range(200):
        hold(1)
    assert held.mean_s == pytest.approx(1, abs=0.01)
    held.end("a", "received before this process counted")
    assert held.mean_s < 1
