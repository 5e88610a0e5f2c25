"""The Celery application and its delivery policy.

The record in Redis is the truth and a message only a wake-up, so Celery is asked for little: late acknowledgement,
no results, no ETA, JSON only, and connections that notice a dead peer. A message that nobody can read is kept as a dead
letter with its cause; Celery alone would log it whole, or end the worker.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import kombu.transport.redis
from celery import Celery
from celery.signals import task_postrun, task_received
from celery.worker.consumer import Consumer
from kombu import Queue

from latentline.errors import LatentlineError
from latentline.records import Records
from latentline.routing import GENERATE_UNACKED, PRIORITY_SEPARATOR, PRIORITY_STEPS, wake_up
from latentline.settings import Settings

from .fairness import InFlight, LeastServedFirst

log = logging.getLogger(__name__)

UNREADABLE_TASK = "latentline.unreadable"
RECONNECT_S, RECONNECT_MOST_S = 0.5, 5.0  # pauses between attempts to reach a broker that is away
BURY_TRIES = 60  # with a second between them: a dead letter outlasts a broker's restart
BRPOP_S = 0.1  # one look into the queues
MAX_KEPT_CHARS = 10_000  # of an unreadable message
UNACKED = {"unacked_key": "", "unacked_index_key": ":index", "unacked_mutex_key": ":mutex"}  # kombu's options, after the role's key
# A worker says nothing to other workers: the records tell who is alive.
LONELY: dict[str, Any] = {"without_heartbeat": True, "without_gossip": True, "without_mingle": True}


def create_app(
    settings: Settings, queues: Sequence[str], records: Records, most_of_one_queue: int, unacked: str = GENERATE_UNACKED
) -> Celery:
    """The application of one worker process, consuming these queues; unreadable messages go to the dead letters.

    Args:
        most_of_one_queue: messages of one queue that are worked on at a time.
        unacked: the role's key for messages under way.
    """
    in_flight = InFlight()
    kombu.transport.redis.loads = _tolerant_loads
    kombu.transport.redis.Channel.Message = TolerantMessage
    app = Celery("latentline", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        task_queues=[Queue(queue, routing_key=queue) for queue in queues],
        task_default_queue=queues[0],
        task_acks_late=True,
        task_ignore_result=True,
        accept_content=["json"],
        task_serializer="json",
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # needs a pidbox queue per worker; the records tell more
        worker_consumer=f"{__name__}:PatientConsumer",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # never give up on the broker
        broker_channel_error_retry=True,  # nor on one that refuses: at its memory bound, without a disk, turned into a replica
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides, not the connection
        broker_transport_options={
            # A job may run for long: the transport must never redeliver on its own (a day).
            "visibility_timeout": 86400,
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            # So that no tenant holds up another. Which queues may be looked into changes whenever a job ends: ask anew often.
            "queue_order_strategy": partial(LeastServedFirst, in_flight, most_of_one_queue),
            "polling_interval": BRPOP_S,
            # What is not acknowledged, kept apart by role: no consumer puts back what another role had in its hands.
            **{name: f"{unacked}{suffix}" for name, suffix in UNACKED.items()},
            # Without these a half-open connection is never noticed.
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "health_check_interval": 5,
        },
    )

    def unreadable(text: str) -> None:
        for _ in range(BURY_TRIES):
            if bury(records, "not a message of this system", text):
                return
            time.sleep(1)

    # Received and not started: the next look into the queues must know of it already.
    def begin(request: Any, **_: object) -> None:
        in_flight.begin(request.delivery_info["routing_key"])

    def end(task: Any, **_: object) -> None:
        in_flight.end(task.request.delivery_info["routing_key"])

    task_received.connect(begin, weak=False)
    task_postrun.connect(end, weak=False)
    app.latentline_records = records
    app.task(unreadable, name=UNREADABLE_TASK, shared=False)
    return app


def bury(records: Records, reason: str, text: str) -> bool:
    """Keep an unreadable message with its cause; whether the broker has it."""
    log.warning("a message is kept as dead letter: %s", reason)
    try:
        records.bury(str(uuid.uuid4()), "message", reason, message=text[:MAX_KEPT_CHARS])
    except LatentlineError as error:
        log.error("a message that cannot be read is not kept: %s", error.message)
        return False
    return True


class TolerantMessage(kombu.transport.redis.Channel.Message):  # type: ignore[misc]
    """kombu's message, but for an entry of a queue that looks like kombu's bookkeeping (see :func:`_tolerant_loads`)."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        if not isinstance(payload, dict):
            payload = _unreadable(json.dumps(payload))
        super().__init__(payload, channel=channel, **options)


class PatientConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, but for messages that name no task or whose body is no task's, and for how it comes back to a broker."""

    def ensure_connected(self, conn: Any) -> Any:
        """Knock again after half a second, then ever less often: Celery's own pauses are 2, 4, 6 s and so on to half a minute."""
        pauses = {"interval_start": RECONNECT_S, "interval_step": RECONNECT_S, "interval_max": RECONNECT_MOST_S}
        conn.ensure_connection = partial(conn.ensure_connection, **pauses)
        return super().ensure_connected(conn)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._bury("no task message", message)

    def on_unknown_task(self, body: Any, message: Any, exc: Any) -> None:
        self._bury(f"unknown task {str(exc)[:100]}", message)

    def on_invalid_task(self, body: Any, message: Any, exc: Any) -> None:
        self._bury(f"invalid task: {str(exc)[:100]}", message)

    def on_decode_error(self, message: Any, exc: Any) -> None:
        self._bury(f"cannot be decoded: {type(exc).__name__}", message)

    def _bury(self, reason: str, message: Any) -> None:
        body = message.body
        if bury(self.app.latentline_records, reason, body.decode(errors="replace") if isinstance(body, bytes) else str(body)):
            message.ack()  # else it comes back with the broker


def _tolerant_loads(text: Any, **options: Any) -> Any:
    """kombu's reading of an envelope, but for one that is not a wake-up: much of what kombu and Celery then read unchecked
    would end the worker with the message lost.
    """
    try:
        read = json.loads(text, **options)
        if isinstance(read, list) and len(read) == 3 and isinstance(read[0], dict):
            return read  # kombu's own bookkeeping of what is not acknowledged: [envelope, exchange, routing key]
        if _is_wake_up(read):
            return read
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return _unreadable(str(text))


def _unreadable(text: str) -> Any:
    """The envelope of a message that keeps this text as a dead letter."""
    return json.loads(wake_up(UNREADABLE_TASK, text[:MAX_KEPT_CHARS], "", 0, str(uuid.uuid4())))


def _is_wake_up(envelope: Any) -> bool:
    """Whether it has the form of :func:`latentline.routing.wake_up`: one task, one argument, nothing that Celery would obey."""
    headers, properties = envelope["headers"], envelope["properties"]
    info = properties["delivery_info"]
    texts = (headers["task"], headers["id"], properties["delivery_tag"], info["exchange"], info["routing_key"])
    (argument,), kwargs, embedded = json.loads(envelope["body"])
    return (
        all(isinstance(one, str) for one in (*texts, argument))
        and (kwargs, any(embedded.values())) == ({}, False)
        and envelope["content-type"] == "application/json"
        and envelope["content-encoding"] == "utf-8"
        and not properties.get("body_encoding")
        and not any(headers.get(name) for name in ("eta", "expires", "group", "compression", "retries"))
        and headers.get("timelimit") in (None, [None, None])
    )
