"""The Celery application and its delivery policy.

The record in Redis is the truth and a message only wakes a worker, so Celery needs few features: late acknowledgement, no
results, no ETA, JSON only, and connections that notice a dead peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import celery.apps.worker
from celery import Celery
from celery.signals import task_postrun, task_received
from kombu import Queue

from latentline import logs
from latentline.records import Records
from latentline.routing import GENERATE_UNACKED, PRIORITY_SEPARATOR, PRIORITY_STEPS
from latentline.settings import Settings

from . import messages
from .attention import Attention
from .blocking import IDLE_S
from .fairness import HeldMessages, LeastServedFirst

# kombu's options for the keys of unacknowledged messages; each value is appended to the role's key.
UNACKED = {"unacked_key": "", "unacked_index_key": ":index", "unacked_mutex_key": ":mutex"}
# Celery's own set-up leaves the handlers alone and takes the level; its banner would be lines between records.
LOGS: dict[str, Any] = {"loglevel": logs.LEVEL, "quiet": True}
# Workers do not talk to each other through Celery: the records tell who is alive.
NO_GOSSIP: dict[str, Any] = {"without_heartbeat": True, "without_gossip": True, "without_mingle": True}


def create_app(
    settings: Settings,
    queues: Sequence[str],
    records: Records,
    max_per_queue: int,
    unacked: str = GENERATE_UNACKED,
    attention: Attention | None = None,
) -> Celery:
    """The application of one worker process that consumes these queues. Unreadable messages become dead letters.

    Args:
        max_per_queue: messages of one shard that may be in progress at a time.
        unacked: the key under which the role keeps its unacknowledged messages.
        attention: at which of the queues to wait; by default at all of them.
    """
    celery.apps.worker.safe_say = lambda *_: None  # "Warm shutdown", written to stderr past all handlers
    held = attention.held if attention else HeldMessages()
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
        worker_enable_remote_control=False,  # would need one more queue per worker; the records tell more
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # reconnect for ever
        broker_channel_error_retry=True,  # also when the broker refuses commands: maxmemory, a full disk, now a replica
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides, not the connection
        broker_transport_options={
            # The transport must not redeliver the message of a long job on its own: one day.
            "visibility_timeout": 86400,
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": partial(LeastServedFirst, held, max_per_queue, attention),
            "polling_interval": IDLE_S,
            # Kept apart by role, so that no process gives back messages that a process of the other role holds.
            **{name: f"{unacked}{suffix}" for name, suffix in UNACKED.items()},
            # Without these a half-open connection is never noticed.
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "health_check_interval": 5,
        },
    )
    messages.install(app, records)

    # Counted when received, not when started: the next BRPOP must already know of it.
    def begin(request: Any, **_: object) -> None:
        held.begin(request.delivery_info["routing_key"], request.id)

    def end(task: Any, **_: object) -> None:
        held.end(task.request.delivery_info["routing_key"], task.request.id)

    task_received.connect(begin, weak=False)
    task_postrun.connect(end, weak=False)
    return app
