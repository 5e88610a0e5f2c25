"""The Celery application: its delivery policy and its fairness among queues."""

from __future__ import annotations

from types import SimpleNamespace

import fakeredis
from celery.signals import task_postrun, task_received

from latentline.records import Records
from latentline.routing import queue_names
from latentline.settings import Settings
from latentline_worker.transport.app import create_app
from latentline_worker.transport.fairness import LeastServedFirst

QUEUES = queue_names("latentline-emoji")


def test_the_delivery_policy() -> None:
    app = create_app(Settings(), QUEUES, Records(fakeredis.FakeRedis(decode_responses=True)), 16)
    assert app.conf.task_acks_late and app.conf.task_ignore_result and app.conf.accept_content == ["json"]
    assert app.conf.worker_prefetch_multiplier == 1
    assert [queue.name for queue in app.conf.task_queues] == QUEUES
    waits_s = app.conf.broker_transport_options["polling_interval"]
    assert waits_s <= 2, "an idle worker reads its pending BRPOP before it ends"
    assert waits_s < app.conf.broker_transport_options["socket_timeout"]
    assert app.conf.worker_consumer == "latentline_worker.transport.messages:TolerantConsumer"
    app.close()


def test_a_message_counts_against_its_queue_from_its_receipt_to_the_end_of_its_task() -> None:
    app = create_app(Settings(), QUEUES, Records(fakeredis.FakeRedis(decode_responses=True)), 1)
    order = app.conf.broker_transport_options["queue_order_strategy"]()
    assert isinstance(order, LeastServedFirst)
    order.update(QUEUES)
    message = SimpleNamespace(delivery_info={"routing_key": QUEUES[0]}, id="a message")
    assert QUEUES[0] in order.consume(len(QUEUES))
    task_received.send(sender=None, request=message)
    assert order.consume(len(QUEUES)) == QUEUES[1:]
    task_postrun.send(sender=None, task=SimpleNamespace(request=message))
    assert QUEUES[0] in order.consume(len(QUEUES))
    app.close()
