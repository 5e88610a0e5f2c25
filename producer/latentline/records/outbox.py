"""Callbacks as operators see them. They are delivered through :class:`latentline.records.Records`."""

from __future__ import annotations

import json
from typing import Any

from latentline import routing
from latentline.errors import JobNotFound
from latentline.scripts import REPLAY_CALLBACK

from .driving import Operation, call_script, hgetall_many, pairs
from .jobs import record_of


def callbacks(job_id: str | None = None, limit: int = 50) -> Operation[list[dict[str, Any]]]:
    """Callbacks with their logs, newest first; of one job or of all."""
    found: list[str] = yield lambda client: client.zrange(routing.callbacks_key(), 0, -1, desc=True)
    wanted = [cid for cid in found if job_id is None or cid.startswith(f"msg_{job_id}_")][:limit]
    raws = yield hgetall_many(wanted, routing.callback_key)
    return [callback_of(raw) for raw in raws if raw]


def replay_callback(callback_id: str) -> Operation[bool]:
    """Send a callback once more, whatever came of it, also to a receiver that said Gone; False when it is not known."""
    return bool((yield from call_script(REPLAY_CALLBACK, id=callback_id)))


def callback_of(raw: dict[str, str]) -> dict[str, Any]:
    """A callback's hash with its numbers and its log read."""
    try:
        record = record_of(pairs(json.loads(raw["record"])))
    except JobNotFound:  # of another version: the list of callbacks must not break on it, and it must not come back for ever
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
