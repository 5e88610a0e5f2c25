"""The transitions of jobs and callbacks, as Lua scripts that the broker runs; time is the broker's own.

Each ``.lua`` file beside this one is one script, with its invariants at its head; ``lib/`` holds what several of them share.
They are called through :mod:`latentline.records`. Keys are derived inside of the scripts from the ids they are given: one
Redis (with replicas), no cluster. The state machine is drawn in ``docs/job-states.md``.
"""

from .script import Script, load

SUBMIT = load("submit")
CLAIM = load("claim")
BEAT = load("beat")
CHECKPOINT = load("checkpoint")
CANCEL = load("cancel")
DELETE = load("delete")
VIEW = load("view")
POLL = load("poll")
PAGE = load("page")
SINCE = load("since")
POSITIONS = load("positions")
RELEASE = load("release")
SETTLE = load("settle")
RETRY = load("retry")
WARN = load("warn")
TAKE_UNANSWERED = load("take_unanswered")
NOTE_ANSWER = load("note_answer")

TAKE_TURN = load("take_turn")
BEGIN_TURN = load("begin_turn")
RECLAIM = load("reclaim")
END_OVERDUE = load("end_overdue")
END_IF_OVERDUE = load("end_if_overdue")
WAKE = load("wake")
ANNOUNCE = load("announce")
HEARTBEAT = load("heartbeat")
BURY = load("bury")
EXPIRE = load("expire")

TAKE_CALLBACK = load("take_callback")
SETTLE_CALLBACK = load("settle_callback")
PUT_BACK_CALLBACK = load("put_back_callback")
WAKE_CALLBACKS = load("wake_callbacks")
REPLAY_CALLBACK = load("replay_callback")

__all__ = [
    "ANNOUNCE", "BEAT", "BEGIN_TURN", "BURY", "CANCEL", "CHECKPOINT", "CLAIM", "DELETE", "END_IF_OVERDUE", "END_OVERDUE", "EXPIRE",
    "HEARTBEAT", "NOTE_ANSWER", "PAGE", "POLL", "POSITIONS", "PUT_BACK_CALLBACK", "RECLAIM", "RELEASE", "REPLAY_CALLBACK", "RETRY",
    "SETTLE", "SETTLE_CALLBACK", "SINCE", "SUBMIT", "TAKE_CALLBACK", "TAKE_TURN", "TAKE_UNANSWERED", "VIEW", "WAKE", "WAKE_CALLBACKS",
    "WARN", "Script",
]  # fmt: skip
