"""Messages that cannot be read: each is kept as a dead letter with its cause, and acknowledged.

Celery alone would log such a message whole, prompt included, or end the worker. :func:`install` changes kombu's Redis transport
where it reads a queue's entry; :class:`TolerantConsumer` handles messages that only Celery's consumer recognises as invalid.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from functools import partial
from typing import Any

import kombu.transport.redis
from celery import Celery
from celery.exceptions import Reject
from celery.worker.consumer import Consumer

from latentline.errors import LatentlineError
from latentline.records import Records
from latentline.routing import wake_up

from .blocking import BlockingChannel

log = logging.getLogger(__name__)

UNREADABLE_TASK = "latentline.unreadable"
RECONNECT_S, MAX_RECONNECT_S = 0.5, 5.0  # pauses between attempts to reach a broker that is away
BURY_TRIES = 60  # one second apart: long enough for a broker to restart
MAX_KEPT_CHARS = 10_000  # of an unreadable message
CONSUMER = f"{__name__}:TolerantConsumer"  # as Celery's settings name a class


def install(app: Celery, records: Records) -> None:
    """Keep unreadable messages of this application as dead letters. The one place where kombu is patched.

    kombu reads each entry of a queue with the module's ``loads`` and makes a ``Channel.Message`` of the result. Both are
    replaced, for the whole process, since kombu offers no setting for them; so is the channel, see :mod:`.blocking`.
    """
    kombu.transport.redis.loads = _tolerant_loads
    kombu.transport.redis.Channel.Message = TolerantMessage
    kombu.transport.redis.Transport.Channel = BlockingChannel

    def unreadable(text: str) -> None:
        for _ in range(BURY_TRIES):
            if bury(records, "not a message of this system", text):
                return
            time.sleep(1)
        raise Reject("the broker did not take the dead letter", requeue=True)  # a normal return would acknowledge the message

    app.conf.worker_consumer = CONSUMER
    app.latentline_records = records
    app.task(unreadable, name=UNREADABLE_TASK, shared=False)


def bury(records: Records, reason: str, text: str) -> bool:
    """Keep an unreadable message as a dead letter; False if the broker did not take it. The text is never logged."""
    log.warning("a message is kept as a dead letter: %s", reason)
    try:
        records.bury(str(uuid.uuid4()), "message", reason, message=text[:MAX_KEPT_CHARS])
    except LatentlineError as error:
        log.error("an unreadable message could not be kept: %s", error.message)
        return False
    return True


class TolerantMessage(kombu.transport.redis.Channel.Message):  # type: ignore[misc]
    """kombu's message, also for a queue entry that has the form of kombu's own bookkeeping (see :func:`_tolerant_loads`)."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        if not isinstance(payload, dict):
            payload = _unreadable_envelope(json.dumps(payload))
        super().__init__(payload, channel=channel, **options)


class TolerantConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, with dead letters for messages it cannot use and shorter pauses between reconnects."""

    def ensure_connected(self, conn: Any) -> Any:
        """Reconnect after half a second, then ever less often. Celery's own pauses are 2, 4, 6 s and so on up to 30 s."""
        pauses = {"interval_start": RECONNECT_S, "interval_step": RECONNECT_S, "interval_max": MAX_RECONNECT_S}
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
            message.ack()  # without an acknowledgement it is delivered again when the broker is back


def _tolerant_loads(text: Any, **options: Any) -> Any:
    """Parse a queue entry. One that is not a wake-up becomes an envelope of :data:`UNREADABLE_TASK` that carries its text.

    kombu and Celery use many fields of an envelope without checking them; a bad one would end the worker and lose the message.
    """
    try:
        read = json.loads(text, **options)
        if isinstance(read, list) and len(read) == 3 and isinstance(read[0], dict):
            return read  # kombu's own bookkeeping of unacknowledged messages: [envelope, exchange, routing key]
        if _is_wake_up(read):
            return read
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return _unreadable_envelope(str(text))


def _unreadable_envelope(text: str) -> Any:
    """A wake-up whose task keeps this text as a dead letter."""
    return json.loads(wake_up(UNREADABLE_TASK, text[:MAX_KEPT_CHARS], "", 0, str(uuid.uuid4())))


def _is_wake_up(envelope: Any) -> bool:
    """Whether it has the form of :func:`latentline.routing.wake_up`: one task, one text argument, no options for Celery to act on."""
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
