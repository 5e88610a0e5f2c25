"""Requests that a client sends again get the job that their first sending made: nobody pays twice for a lost answer."""

from __future__ import annotations

from typing import Literal

from latentline.jobs import JobRecord, Sending
from latentline.scripts import NOTE_ANSWER, TAKE_UNANSWERED

from .driving import Operation, call_script
from .jobs import get

ENDED_S = 600  # a job that ended longer ago is not given to a request that is sent again
# An answer that went out may be lost on its way, and the client then sends again after a pause of seconds. Later requests of that
# kind have lost another answer.
WRITTEN_S = 60

AnswerOutcome = Literal["dropped", "written", "given up"]


def take_unanswered(sending: Sending) -> Operation[JobRecord | None]:
    """The job that an earlier sending of this request has made; None when there is none."""
    found = yield from call_script(TAKE_UNANSWERED, digest=sending.digest, sending=sending.count, ended_s=ENDED_S, written_s=WRITTEN_S)
    return (yield from get(found)) if found else None


def note_answer(job_id: str, sending: Sending, outcome: AnswerOutcome) -> Operation[bool]:
    """Note what became of a request's answer; whether it still was this request's to say.

    Args:
        outcome: ``dropped``: the client closed its connection. ``written``: the answer went out. ``given up``: it was dropped and no
            request has come for it since, and none gets it any more.
    """
    noted = yield from call_script(NOTE_ANSWER, id=job_id, digest=sending.digest, sending=sending.count, outcome=outcome)
    return bool(noted)
