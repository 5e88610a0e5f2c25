"""The Celery application and its delivery policy.

The record in Redis is the truth and a message only a wake-up, so Celery is asked for little: late acknowledgement,
no results, no ETA, JSON only, and connections that notice a dead peer.
"""

from __future__ import annotations

from celery import Celery
from kombu import Queue

from latentline.routing import PRIORITY_SEPARATOR, PRIORITY_STEPS, queue_names

from .settings import WorkerSettings


def create_app(settings: WorkerSettings, model_id: str) -> Celery:
    """The application of one worker process, consuming the wake-ups of one model."""
    app = Celery("latentline", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    queues = queue_names(model_id)
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
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # never give up on the broker
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides, not the connection
        broker_transport_options={
            # A job may run for long: the transport must never redeliver on its own (a day).
            "visibility_timeout": 86400,
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "round_robin",  # over the shards, so that no tenant holds up another
            # Without these a half-open connection is never noticed.
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "health_check_interval": 5,
        },
    )
    return app
