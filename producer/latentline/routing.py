"""Job -> queue name; task names; every Redis key in one place; the wake-up message.

A Celery message is only a wake-up that carries a job id: the record is the truth. The message is built here,
without Celery, so that a record and its wake-up are written in one atomic step and producers stay light.
"""

from __future__ import annotations

import base64
import json
import uuid

PREFIX = "latentline"
GENERATE_TASK = "latentline.generate"

# kombu's Redis transport keeps a list for each of these priorities; a message's priority falls into the
# nearest one below it (kombu.transport.redis.Channel.priority_steps).
PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"


def queue_name(model: str) -> str:
    """The Celery queue from which workers that hold ``model`` take their wake-ups."""
    return f"{PREFIX}.generate.{model}"


def priority_step(priority: int) -> int:
    """The list into which a priority falls: jobs of one step are served first come, first served."""
    return max(step for step in PRIORITY_STEPS if step <= priority)


def queue_list(queue: str, priority: int) -> str:
    """The Redis list in which kombu looks for messages of ``priority`` (0 to 9) of ``queue``."""
    step = priority_step(priority)
    return queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}"


def job_key(job_id: str) -> str:
    """Hash: the record of one job."""
    return f"{PREFIX}:job:{job_id}"


def events_key(job_id: str) -> str:
    """Stream: the events of one job."""
    return f"{PREFIX}:events:{job_id}"


def index_key(status: str | None = None) -> str:
    """Sorted set of job ids by creation time in ms: all, or those in one status."""
    return f"{PREFIX}:jobs" if status is None else f"{PREFIX}:jobs:{status}"


def waiting_key(model: str) -> str:
    """Sorted set of the queued job ids of a model in the order in which they are served."""
    return f"{PREFIX}:waiting:{model}"


def idempotency_key(tenant: str, key: str) -> str:
    """String: the job id and the fingerprint that this key stands for."""
    return f"{PREFIX}:idempotency:{tenant}:{key}"


def models_key() -> str:
    """Hash: model id -> ModelInfo of every model that some worker has served."""
    return f"{PREFIX}:models"


def workers_key() -> str:
    """Sorted set of worker names by the time of their last heartbeat."""
    return f"{PREFIX}:workers"


def wake_up(job_id: str, queue: str, priority: int) -> str:
    """A Celery protocol 2 message in kombu's Redis envelope: ``generate(job_id)``."""
    task_id = str(uuid.uuid4())
    body = json.dumps([[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": GENERATE_TASK,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "timelimit": [None, None],
                "expires": None,
                "eta": None,
                "argsrepr": f"({job_id!r},)",
                "kwargsrepr": "{}",
                "origin": "latentline",
                "ignore_result": True,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )
