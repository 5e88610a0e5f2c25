"""Dead letters: jobs that failed permanently, and unreadable messages."""

from __future__ import annotations

import json
from typing import Any

from latentline import routing
from latentline.errors import InvalidRequest, JobNotFound
from latentline.jobs import JobRequest
from latentline.scripts import BURY

from .driving import Operation, call_script


def dead_letters() -> Operation[list[dict[str, Any]]]:
    """All of them, newest first."""
    raw = yield lambda client: client.hgetall(routing.dead_key())
    return sorted((json.loads(letter) for letter in raw.values()), key=lambda letter: float(letter["at"]), reverse=True)


def dead_letter(dead_id: str) -> Operation[dict[str, Any]]:
    """One dead letter; raises JobNotFound."""
    raw = yield lambda client: client.hget(routing.dead_key(), dead_id)
    if raw is None:
        raise JobNotFound(f"no dead letter {dead_id!r}")
    letter: dict[str, Any] = json.loads(raw)
    return letter


def request_of_letter(letter: dict[str, Any]) -> JobRequest:
    """The request of a job that failed permanently, to be submitted again as a new job.

    Raises:
        InvalidRequest: the letter is of an unreadable message.
        JobNotFound: this version cannot read the request.
    """
    if letter["kind"] != "job":
        raise InvalidRequest("dead_id", letter["id"], "the dead letter of a job: an unreadable message cannot be replayed")
    try:
        return JobRequest.model_validate_json(letter["request"]).model_copy(update={"idempotency_key": None})
    except (KeyError, ValueError):
        raise JobNotFound(f"the dead letter {letter['id']!r} holds a request that this version cannot read") from None


def drop_dead_letter(dead_id: str) -> Operation[None]:
    """Forget a dead letter; raises JobNotFound."""
    yield from dead_letter(dead_id)
    yield lambda client: client.hdel(routing.dead_key(), dead_id)
    yield lambda client: client.zrem(routing.dead_times_key(), dead_id)


def bury(dead_id: str, kind: str, reason: str, **more: Any) -> Operation[None]:
    """Store a dead letter for something unreadable, with its cause."""
    yield from call_script(BURY, id=dead_id, letter=json.dumps({"id": dead_id, "kind": kind, "reason": reason, **more}))
