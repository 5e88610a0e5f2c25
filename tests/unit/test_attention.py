"""At which queues a worker waits: those of models in memory, few of them for models without jobs."""

from __future__ import annotations

import threading

import pytest

from latentline.routing import PRIORITY_STEPS, queue_name, queue_names
from latentline_worker.transport.attention import QUIET_LISTS, Attention
from latentline_worker.transport.blocking import IDLE_S
from latentline_worker.transport.fairness import LeastServedFirst

PATIENCE_S = 60


def attention_of(*models: str, level: int = 1) -> tuple[Attention, list[str]]:
    return Attention(models, level), [queue for model in models for queue in queue_names(model, level)]


def test_queues_of_closed_models_are_left_out() -> None:
    attention, queues = attention_of("a", "b")
    assert attention.choose(queues) == []
    attention.open("a")
    attention.busy({"a", "b"})
    assert attention.choose(queues) == queue_names("a")
    attention.close("a")
    attention.open("b")
    assert attention.choose(queues) == queue_names("b")


@pytest.mark.parametrize("level", [1, 2])
def test_a_quiet_model_has_its_first_shard_until_it_has_a_job(level: int) -> None:
    attention, queues = attention_of("a", level=level)
    attention.open("a")
    first = [queue_name("a", 0, one) for one in range(1, level + 1)]
    assert attention.choose(queues) == first
    attention.busy(["a"])
    assert attention.choose(queues) == queues
    attention.busy([])
    assert attention.choose(queues) == first
    attention.held.begin(first[-1], "1")  # a message that came since the last heartbeat
    assert attention.choose(queues) == queues
    attention.held.end(first[-1], "1")
    assert attention.choose(queues) == first


def test_of_many_quiet_models_those_used_last_are_waited_for() -> None:
    names = [f"model-{i}" for i in range(10)]
    attention, queues = attention_of(*names)
    for name in names:
        attention.open(name)
    most = QUIET_LISTS // len(PRIORITY_STEPS)
    assert attention.choose(queues) == [queue_name(name, 0) for name in names[-most:]]
    attention.used(names[0])
    assert queue_name(names[0], 0) in attention.choose(queues)
    attention.busy([names[1]])
    assert set(queue_names(names[1])) <= set(attention.choose(queues)), "those with jobs are not among the quiet ones"


def test_an_idle_wait_at_the_broker_of_ten_models_takes_under_half_a_kilobyte_a_second() -> None:
    names = [f"owner/a-model-with-a-long-name-{i}" for i in range(10)]
    for level in (1, 2):
        attention, queues = attention_of(*names, level=level)
        for name in names:
            attention.open(name)
        lists = len(PRIORITY_STEPS) * attention.choose(queues)
        assert sum(len(queue) + 12 for queue in lists) / IDLE_S <= 550


def test_a_model_is_drained_when_no_message_is_held_and_none_can_come() -> None:
    attention, queues = attention_of("a", "b")
    attention.open("a")
    attention.open("b")
    attention.choose(queues)
    attention.close("a")
    assert not attention.drained("a", 0), "the wait that has begun may still bring a message"
    attention.held.begin(queue_name("a", 0), "1")
    attention.choose(queues)
    assert not attention.drained("a", 0), "a message is held"
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(attention.drained("a", PATIENCE_S)))
    waiting.start()
    attention.held.end(queue_name("a", 0), "1")
    waiting.join(PATIENCE_S)
    assert found == [True]


def test_a_model_that_leaves_while_nothing_else_is_waited_for() -> None:
    attention, queues = attention_of("a")
    attention.open("a")
    order = LeastServedFirst(attention.held, 4, attention)
    order.update(queues)
    assert order.consume(99) == [queue_name("a", 0)]
    attention.close("a")
    assert order.consume(99) == [] and attention.drained("a", 0)
    assert not order.changing
    attention.changing = True
    assert order.changing
