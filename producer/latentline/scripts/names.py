"""What Python and Lua share, written as Lua: the keys and the constants of :mod:`latentline.routing`.

So every key is built in one place, and neither side can name one that the other does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from latentline import routing

CALLBACK_KEPT_S = 7 * 86400  # at least: a callback's tries go on for three days and more, however short the job's own retention
CALLBACK_GRACE_S = 30  # a callback that no deliverer has taken this long after its message was written gets another message

# An idempotency key is kept this long until its job ends, then as long as the record. Workers of version 0.1.0 do not shorten it.
KEY_KEPT_S = 30 * 86400
# A preview is deleted when its job ends or a newer one replaces it, and after this time in any case: workers of version 0.1.0
# do not delete it.
PREVIEW_KEPT_S = 3600
# In `waiting` a job's score is its priority step times this, plus the number of its submission.
PRIORITY_SCORE = 10**14
# From here on no client sends its request again: three tries of ten minutes each, and the pauses between them.
UNANSWERED_KEPT_S = 3600
SIGNAL_KEPT_S = 60  # a worker reads its signals at once; what it has not read after this time, a renewal has told it


def keys() -> str:
    """The Lua table ``keys``: ``keys.job(id)`` for ``routing.job_key(id)``, and so on."""
    functions = {name.removesuffix("_key"): value for name, value in vars(routing).items() if name.endswith("_key")}
    return "\n".join(["local keys = {}", *(_key(name, function) for name, function in functions.items())])


def constants() -> str:
    """The Lua table ``const``."""
    # Filled in by lib/wakeups.lua. None of the names needs escaping in JSON; the priority stands unquoted in the message.
    message = routing.wake_up("@task@", "@argument@", "@queue@", "@priority@", "@message@").replace('"@priority@"', "@priority@")
    values = {
        "KEY_KEPT_S": str(KEY_KEPT_S),
        "PREVIEW_KEPT_S": str(PREVIEW_KEPT_S),
        "SIGNAL_KEPT_S": str(SIGNAL_KEPT_S),
        "UNANSWERED_KEPT_S": str(UNANSWERED_KEPT_S),
        "CALLBACK_GRACE_S": str(CALLBACK_GRACE_S),
        "CALLBACK_KEPT_S": str(CALLBACK_KEPT_S),
        "CALLBACK_QUEUE": _text(routing.CALLBACK_QUEUE),
        "CALLBACK_TASK": _text(routing.CALLBACK_TASK),
        "GENERATE_TASK": _text(routing.GENERATE_TASK),
        "MESSAGE": _text(message),
        "NUM_SHARDS": str(routing.NUM_SHARDS),
        "PRIORITY_SCORE": str(PRIORITY_SCORE),
        "PRIORITY_SEPARATOR": _text(routing.PRIORITY_SEPARATOR),
        "PRIORITY_STEPS": "{" + ", ".join(map(str, routing.PRIORITY_STEPS)) + "}",
    }
    return "local const = {" + ", ".join(f"{name} = {value}" for name, value in values.items()) + "}"


def _key(name: str, function: Callable[..., str]) -> str:
    """One function of ``keys``. It is the Python function with its arguments left open, so all of those must be text in it."""
    parameters = inspect.signature(function).parameters
    body = function(*(f"\0{parameter}\0" for parameter in parameters))
    parts = [part if i % 2 else _text(part) for i, part in enumerate(body.split("\0"))]
    lines = [f"return {' .. '.join(part for part in parts if part != _text(''))}"]
    if parameters and all(parameter.default is None for parameter in parameters.values()):  # all of them may be left out
        lines.insert(0, f"if {next(iter(parameters))} == nil then return {_text(function())} end")
    return f"function keys.{name}({', '.join(parameters)}) {' '.join(lines)} end"


def _text(value: str) -> str:
    """A Lua string literal."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\{ord(c):03d}" for c in escaped) + '"'
