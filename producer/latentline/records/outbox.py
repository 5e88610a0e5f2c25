"""Callbacks: how operators list and replay them, and how deliverers take and settle them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from latentline import routing
from latentline.errors import JobNotFound
from latentline.scripts import PUT_BACK_CALLBACK, REPLAY_CALLBACK, SETTLE_CALLBACK, TAKE_CALLBACK, WAKE_CALLBACKS

from .driving import Driven, Operation, broker_time, call_script, driven, hgetall_many, pairs, set_if_absent
from .secrets import read_secrets
from .stored import record_of

MAX_WAKE_CALLBACKS = 1000  # Max. callbacks woken per call.


def callbacks(job_id: str | None = None, limit: int = 50) -> Operation[list[dict[str, Any]]]:
    """Callbacks with their logs, newest first; of one job or of all."""
    found: list[str] = yield lambda client: client.zrange(routing.callbacks_key(), 0, -1, desc=True)
    wanted = [cid for cid in found if job_id is None or cid.startswith(f"msg_{job_id}_")][:limit]
    raws = yield hgetall_many(wanted, routing.callback_key)
    return [callback_of(raw) for raw in raws if raw]


def replay_callback(callback_id: str) -> Operation[bool]:
    """Send a callback once more, whatever its status, also to a receiver that answered 410 Gone; False when it is not known."""
    return bool((yield from call_script(REPLAY_CALLBACK, id=callback_id)))


def due_callbacks() -> Operation[tuple[int, float]]:
    """How many callbacks are due (counted up to 1000), and for how many seconds the oldest of them has been."""
    now = yield from broker_time()
    key = routing.due_callbacks_key()
    due = yield lambda client: client.zrangebyscore(key, "-inf", now, start=0, num=MAX_WAKE_CALLBACKS, withscores=True)
    return len(due), max(0.0, now - due[0][1]) if due else 0.0


class Receiver(NamedTuple):
    """Of a callback that is to be sent."""

    disabled: bool
    """It has answered 410 Gone."""
    secrets: list[str]
    """With which its tenant's callbacks are signed; none where the tenant has no secret of its own."""


class Outbox(Driven):
    """What a process that delivers callbacks does with them."""

    @driven
    def take_callback(self, callback_id: str, lock_s: float) -> Operation[dict[str, Any] | None]:
        """A due callback for one try within ``lock_s``; None when it has ended, is not due yet, or another deliverer has it."""
        reply = yield from call_script(TAKE_CALLBACK, id=callback_id, lock_s=lock_s)
        return callback_of(pairs(reply)) if reply else None

    @driven
    def settle_callback(self, callback_id: str, tries: int, entry: dict[str, Any], status: str, delay_s: float = 0.0) -> Operation[None]:
        """Log a try: ``pending`` and due again after ``delay_s``, or ended (delivered, failed, refused, gone).

        Nothing when another deliverer has taken it since: ``tries`` is the number of the try, as it was taken.
        """
        yield from call_script(SETTLE_CALLBACK, id=callback_id, tries=tries, entry=json.dumps(entry), status=status, delay_s=delay_s)

    @driven
    def put_back_callback(self, callback_id: str, tries: int, delay_s: float) -> Operation[None]:
        """A callback that was taken and not tried: due again after ``delay_s``; ``tries`` as in :meth:`settle_callback`."""
        yield from call_script(PUT_BACK_CALLBACK, id=callback_id, tries=tries, delay_s=delay_s)

    @driven
    def take_callbacks_turn(self, process: str, life_s: float) -> Operation[bool]:
        """Whether this process may wake callbacks now. If so, no other process may for ``life_s``, also if this one ends."""
        return bool((yield set_if_absent(routing.callbacks_turn_key(), process, life_s)))

    @driven
    def wake_callbacks(self) -> Operation[int]:
        """Hand every callback whose next try is due to the deliverers; how many."""
        return int((yield from call_script(WAKE_CALLBACKS, most=MAX_WAKE_CALLBACKS)))

    @driven
    def receiver(self, url: str, tenant: str) -> Operation[Receiver]:
        """What is to be known before a try, in one round trip; raises ConfigurationError where a secret cannot be read."""

        def call(client: Any) -> Any:
            pipeline = client.pipeline(transaction=False)
            pipeline.hexists(routing.disabled_receivers_key(), url)
            pipeline.lrange(routing.secret_key(tenant), 0, -1)
            pipeline.time()
            return pipeline.execute()

        disabled, entries, (seconds, _) = yield call
        return Receiver(bool(disabled), read_secrets(entries, float(seconds)))


def callback_of(raw: dict[str, str]) -> dict[str, Any]:
    """A callback's hash with its numbers and its log read."""
    try:
        record = record_of(pairs(json.loads(raw["record"])))
    except JobNotFound:  # a record of another version: it must neither break the list nor be retried for ever
        record = None
    return {
        **{key: raw[key] for key in ("id", "job_id", "type", "url", "status")},
        "seq": int(raw["seq"]),
        "tries": int(raw["tries"]),
        "at": float(raw["at"]),
        "due": float(raw["due"]),
        "log": json.loads(raw.get("log") or "[]"),
        "record": record,
    }
