"""How long one BRPOP waits."""

from __future__ import annotations

import kombu.transport.redis
import pytest

from latentline_worker.transport.blocking import CAPPED_FRACTION, IDLE_S, MAX_CAPPED_S, MIN_CAPPED_S, BlockingChannel, wait_s
from latentline_worker.transport.fairness import HeldMessages, LeastServedFirst


def test_it_waits_long_only_while_every_queue_may_be_taken() -> None:
    assert wait_s(capped=False, mean_held_s=None) == wait_s(capped=False, mean_held_s=1.0) == IDLE_S
    assert wait_s(capped=True, mean_held_s=None) == MAX_CAPPED_S
    assert wait_s(capped=True, mean_held_s=60.0) == MAX_CAPPED_S
    assert wait_s(capped=True, mean_held_s=0.0) == MIN_CAPPED_S


@pytest.mark.parametrize("held_s", [2.0, 4.0, 8.0, 10.0, 60.0])
def test_places_of_a_shard_at_its_limit_are_filled_for_98_percent_of_the_time(held_s: float) -> None:
    """Jobs end at any time while BRPOP waits, so a place is empty for half of that on average."""
    empty_s = wait_s(capped=True, mean_held_s=held_s) / 2
    assert held_s / (held_s + empty_s) >= 0.98
    assert held_s / 16 / wait_s(True, held_s) <= 2.5 or wait_s(True, held_s) == MAX_CAPPED_S, "BRPOPs for each of 16 jobs in flight"
    assert 1 / (1 + CAPPED_FRACTION / 2) >= 0.98


def test_each_call_is_sent_with_the_state_of_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float | None] = []
    monkeypatch.setattr(kombu.transport.redis.Channel, "_brpop_start", lambda _, timeout=None: sent.append(timeout))
    held = HeldMessages(lambda: 0.0)
    order = LeastServedFirst(held, max_per_queue=1)
    order.update(["a", "b"])
    channel = BlockingChannel.__new__(BlockingChannel)  # without a connection
    channel._queue_cycle = order
    channel._brpop_start()
    held.begin("a", "1")
    channel._brpop_start()
    held.end("a", "1")
    channel._brpop_start()
    channel._queue_cycle = object()  # of an application that is not ours
    channel._brpop_start()
    assert sent == [IDLE_S, MAX_CAPPED_S, IDLE_S, None]
