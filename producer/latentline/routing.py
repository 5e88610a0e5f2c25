"""Names of queues, tasks and Redis keys, all in one place, and the wake-up message.

A Celery message only carries a job's id; the record is the truth. The message is built here without Celery, so that a
record and its wake-up are written in one atomic step and producers need no Celery.
"""

from __future__ import annotations

import functools
import json
import re

PREFIX = "latentline"
GENERATE_TASK = "latentline.generate"
CALLBACK_TASK = "latentline.callback"
CALLBACK_QUEUE = f"{PREFIX}.callbacks"

# Where kombu keeps the messages that a worker has taken and not acknowledged, with ":index" and ":mutex" beside it.
GENERATE_UNACKED = f"{PREFIX}.unacked.generate"
CALLBACK_UNACKED = f"{PREFIX}.unacked.callbacks"

# kombu's Redis transport keeps a list for each of these priorities; a message's priority falls into the
# nearest one below it (kombu.transport.redis.Channel.priority_steps).
PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"

# What the library that limits rates keeps of each API key begins with this.
RATES = f"{PREFIX}:rate"

# A model's jobs are spread over this many queues, which its workers serve in turn: a tenant with a thousand jobs fills
# one of them and does not delay those in the others. Each priority step has a list of each, so BRPOP watches 4 x 8 lists.
NUM_SHARDS = 8


def queue_name(model: str, shard: int = 0, level: int = 1) -> str:
    """The Celery queue of one shard of a model's jobs of one level.

    Workers take wake-ups from the queues of their own level and below only, so a job that an older worker could not read
    never reaches it. "@" is in no model's id, so no model's queue is another one's.
    """
    return f"{queue_prefix(model, level)}{shard}"


def queue_prefix(model: str, level: int = 1) -> str:
    """What the names of a model's queues of one level begin with; the shard follows."""
    return f"{PREFIX}.generate.{model}." if level == 1 else f"{PREFIX}.generate.{model}@{level}."


def queue_names(model: str, level: int = 1) -> list[str]:
    """The queues from which workers of this level that hold ``model`` take their wake-ups."""
    return [queue_name(model, shard, one) for one in range(1, level + 1) for shard in range(NUM_SHARDS)]


@functools.lru_cache(maxsize=1024)
def level_1_queue(queue: str) -> str:
    """The queue of the same model and shard at level 1. A tenant's jobs of a model lie in one shard at every level."""
    return re.sub(r"@\d+(?=\.\d+$)", "", queue)


def priority_step(priority: int) -> int:
    """The step to which a priority is rounded down: jobs of one step are served in order of arrival."""
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


def checkpoint_key(job_id: str) -> str:
    """String of bytes: the sampler history from which another worker continues."""
    return f"{PREFIX}:checkpoint:{job_id}"


def index_key(status: str | None = None) -> str:
    """Sorted set of job ids by creation time in ms: all, or those in one status."""
    return f"{PREFIX}:jobs" if status is None else f"{PREFIX}:jobs:{status}"


def tenant_index_key(tenant: str) -> str:
    """Sorted set of the ids of a tenant's jobs by creation time in ms."""
    return f"{PREFIX}:jobs:of:{tenant}"


def api_key_key(prefix: str) -> str:
    """Hash: an API key. Outside of what the broker's other users may write: theirs is ``latentline:*`` at most."""
    return f"{PREFIX}.key:{prefix}"


def api_keys_key() -> str:
    """Sorted set of the prefixes of all API keys by the time of their creation."""
    return f"{PREFIX}.keys"


def secret_key(tenant: str) -> str:
    """List: the callback secrets of a tenant, newest first. Only the process that delivers callbacks may read it."""
    return f"{PREFIX}.secret:{tenant}"


def secrets_key() -> str:
    """Hash: tenant with callback secrets of its own -> when they were made, newest first. It holds no secret."""
    return f"{PREFIX}.secrets"


def preview_key(job_id: str) -> str:
    """Hash: the newest preview of a job that has not ended (``data``), and the ``seq`` of its event."""
    return f"{PREFIX}:preview:{job_id}"


def waiting_key(model: str) -> str:
    """Sorted set of the queued job ids of a model by priority step and time."""
    return f"{PREFIX}:waiting:{model}"


def leases_key() -> str:
    """Sorted set of running job ids by the time at which their lease runs out."""
    return f"{PREFIX}:leases"


def delayed_key() -> str:
    """Sorted set of job ids that wait for another try, by the time at which it is due."""
    return f"{PREFIX}:delayed"


def deadlines_key() -> str:
    """Sorted set of the ids of jobs that have a deadline and have not ended, by that deadline."""
    return f"{PREFIX}:deadlines"


def expiring_key() -> str:
    """Sorted set of ended jobs (``tenant/id``) by the time at which their images are deleted."""
    return f"{PREFIX}:expiring"


def tenants_key() -> str:
    """Hash: tenant -> cost of its jobs that have not ended, in network rows."""
    return f"{PREFIX}:tenants"


def shards_key(model: str) -> str:
    """Hash: tenant -> shard of its jobs of a model, while it has any."""
    return f"{PREFIX}:shards:{model}"


def open_key(model: str) -> str:
    """Hash: tenant -> number of its jobs of a model that have not ended."""
    return f"{PREFIX}:open:{model}"


def idempotency_key(tenant: str, key: str) -> str:
    """Hash: the job id and the fingerprint that this key stands for."""
    return f"{PREFIX}:idempotency:{tenant}:{key}"


def unanswered_key(digest: str) -> str:
    """Sorted set of job ids by creation time in ms: jobs of one API key and body whose answer the client may not have received."""
    return f"{PREFIX}:jobs:unanswered:{digest}"


def messages_key() -> str:
    """Integer: the number of the newest wake-up; it also numbers jobs in the order of their submission."""
    return f"{PREFIX}:messages"


def callback_key(callback_id: str) -> str:
    """Hash: one callback to be delivered, with its log."""
    return f"{PREFIX}:callback:{callback_id}"


def callbacks_key() -> str:
    """Sorted set of all callback ids by the time of their event."""
    return f"{PREFIX}:callbacks"


def due_callbacks_key() -> str:
    """Sorted set of undelivered callback ids by the time of their next try."""
    return f"{PREFIX}:callbacks:due"


def disabled_receivers_key() -> str:
    """Hash: receiver URL -> when it answered 410 Gone."""
    return f"{PREFIX}:callbacks:disabled"


def dead_key() -> str:
    """Hash: id -> a dead letter (JSON): a job that failed permanently, or an unreadable message."""
    return f"{PREFIX}:dead"


def dead_times_key() -> str:
    """Sorted set of dead letters' ids by their time."""
    return f"{PREFIX}:dead:at"


def models_key() -> str:
    """Hash: model id -> the first fields of the ModelInfo of every model that some worker has ever served.

    Readers of version 0.1.0 know models from here alone. Nothing in it expires.
    """
    return f"{PREFIX}:models"


def announced_key() -> str:
    """Hash: worker name -> what it announces of itself and its models."""
    return f"{PREFIX}:announced"


def announced_at_key() -> str:
    """Sorted set of the workers in :func:`announced_key` by the time of their last announcement."""
    return f"{PREFIX}:announced:at"


def workers_key() -> str:
    """Sorted set of worker names by the time of their last heartbeat."""
    return f"{PREFIX}:workers"


def working_key(worker: str) -> str:
    """String: what a worker does now (:class:`latentline.models.Working`); it expires with the worker."""
    return f"{PREFIX}:working:{worker}"


def signals_key(worker: str) -> str:
    """List: what was decided about jobs that this worker runs (``verdict token job_id``), until it has read it."""
    return f"{PREFIX}:signals:{worker}"


def turn_key(duties: str) -> str:
    """String: the process that does these duties of the whole fleet now; it expires within seconds."""
    return f"{PREFIX}:turn:{duties}"


def callbacks_turn_key() -> str:
    """The same for the wake-ups of callbacks. Apart, so that the rules of the broker's users need not name it."""
    return f"{PREFIX}:callbacks:turn"


def turns_key() -> str:
    """Hash: when the newest turn was (``at``), since when turns have had no gap (``since``), and how far each model was searched."""
    return f"{PREFIX}:turns"


def wake_up(task: str, argument: str, queue: str, priority: int | str, message_id: str) -> str:
    """A Celery protocol 2 message in kombu's Redis envelope: ``task(argument)``.

    The body is plain JSON and not base64, so that a script can fill in a template of it: see :mod:`latentline.scripts`.
    """
    body = json.dumps([[argument], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": message_id,
                "root_id": message_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "timelimit": [None, None],
                "expires": None,
                "eta": None,
                "argsrepr": f"({argument!r},)",
                "kwargsrepr": "{}",
                "origin": "latentline",
                "ignore_result": True,
            },
            "properties": {
                "correlation_id": message_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "delivery_tag": message_id,
            },
        }
    )
