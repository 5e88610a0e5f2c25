"""How operations on Redis are written once and driven by a blocking client or an asyncio one.

An operation is a generator that yields Redis calls and returns its result. :func:`run` drives it with a blocking client,
:func:`arun` with an asyncio client; the two differ in one ``await``. Applications, the command line and workers all use them.
Workers keep one client, so their operations are methods of subclasses of :class:`Driven`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import redis
import redis.asyncio

from latentline import routing
from latentline.errors import BrokerUnavailable
from latentline.jobs import DEFAULT_RETENTION_S, LEVEL
from latentline.scripts import Script

log = logging.getLogger(__name__)
_CODE = re.compile(r"[A-Z]{3,20}")

T = TypeVar("T")
P = ParamSpec("P")
D = TypeVar("D", bound="Driven")
Call = Callable[[Any], Any]
Operation = Generator[Call, Any, T]
# What a broker raises that is unreachable, full, read-only, or that refuses or fails a command.
FAILURES = (redis.ConnectionError, redis.TimeoutError, redis.ResponseError, OSError)


def run(client: redis.Redis, operation: Operation[T]) -> T:
    """Drive an operation with a blocking client.

    Raises:
        BrokerUnavailable: Redis does not answer, or answers with an error that the operation does not handle.
    """
    with domain_errors():
        try:
            call = operation.send(None)
            while True:
                try:
                    value = call(client)
                except FAILURES as error:
                    call = operation.throw(error)  # the operation may handle it
                else:
                    call = operation.send(value)
        except StopIteration as done:
            result: T = done.value
    return result


async def arun(client: redis.asyncio.Redis, operation: Operation[T]) -> T:
    """Drive an operation with an asyncio client; raises as :func:`run`."""
    with domain_errors():
        try:
            call = operation.send(None)
            while True:
                try:
                    value = await call(client)
                except FAILURES as error:
                    call = operation.throw(error)  # the operation may handle it
                else:
                    call = operation.send(value)
        except StopIteration as done:
            result: T = done.value
    return result


class Driven:
    """What a worker does with records, on its own blocking client.

    Args:
        retention_s: how long an ended job is kept.
        level: of the requests that this worker can read, see :data:`latentline.models.LEVEL`.
    """

    def __init__(self, client: redis.Redis, retention_s: int = DEFAULT_RETENTION_S, level: int = LEVEL) -> None:
        self._client, self._retention_s, self.level = client, retention_s, level


def driven(method: Callable[Concatenate[D, P], Operation[T]]) -> Callable[Concatenate[D, P], T]:
    """A method that is written as an operation and called as a function: driven by the client of its object."""

    def call(self: D, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(self._client, method(self, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


@contextmanager
def domain_errors() -> Iterator[None]:
    """Translate redis errors into domain errors. The original text is dropped: it may hold a user name or an address."""
    try:
        yield
    except FAILURES as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> BrokerUnavailable:
    """The domain error for a redis error. Its text is for the log: a client is told the reason without it."""
    # An error reply may come from a fault in a script, and its text says where. A broker that is away is common, and the caller
    # that waits for it logs that.
    level = logging.WARNING if isinstance(error, redis.ResponseError) else logging.DEBUG
    log.log(level, "the broker failed: %s", error)
    return BrokerUnavailable(_reason(error))


def _reason(error: Exception) -> str:
    text = str(error)  # where a command inside of a script was refused, the reason may stand further back in it
    if isinstance(error, redis.AuthenticationError):
        return "the broker refuses the user or the password of LATENTLINE_REDIS_URL"
    if "certificate verify failed" in text:
        return "the broker's certificate is not trusted: see ssl_ca_certs in LATENTLINE_REDIS_URL"
    if isinstance(error, redis.exceptions.NoPermissionError) or "NOPERM" in text or "ACL failure" in text:
        return "the broker does not let the user of LATENTLINE_REDIS_URL do this: see deploy/valkey/users.acl"
    if "MISCONF" in text:
        return "the broker cannot write to its disk and refuses changes"
    code = text.partition(" ")[0]  # such as NOREPLICAS or BUSY; redis has exception types for some of them only
    return f"the broker does not answer as it should: {code if _CODE.fullmatch(code) else type(error).__name__}"


def call_script(script: Script, **arguments: Any) -> Operation[Any]:
    """Call a script by its SHA. A broker that does not know it, after a restart or a failover, gets its text."""
    values = script.arguments(**arguments)
    try:
        return (yield lambda client: client.evalsha(script.sha, 0, *values))
    except redis.exceptions.NoScriptError:
        return (yield lambda client: client.eval(script.source, 0, *values))


def call_script_many(
    script: Script, many: Sequence[dict[str, Any]], last: Sequence[Sequence[Any]] = (), *, keep_errors: bool = False
) -> Operation[list[Any]]:
    """Call a script once for each set of arguments, in one round trip; the replies, in order.

    Args:
        last: commands that follow on the connection that made the calls; their replies come last.
        keep_errors: return an error as the reply of the call that failed. The calls beside it have been done.

    Raises:
        redis.ResponseError: the first error among the replies, without ``keep_errors``.
    """
    values = [script.arguments(**arguments) for arguments in many]
    by_sha: list[tuple[Any, ...]] = [("EVALSHA", script.sha, 0, *one) for one in values]
    replies: list[Any] = yield _pipeline([*by_sha, *last])
    while unknown := [i for i in range(len(many)) if isinstance(replies[i], redis.exceptions.NoScriptError)]:
        # Only the calls that were not done are made again: the broker may learn the script, and forget it, between two of them.
        # It ends, since the call that brings the text is always done.
        text = ("EVAL", script.source, 0, *values[unknown[0]])
        again = yield _pipeline([text, *(by_sha[i] for i in unknown[1:]), *last])
        for i, reply in zip(unknown, again, strict=False):
            replies[i] = reply
        replies[len(many) :] = again[len(unknown) :]
    for reply in replies:
        if isinstance(reply, redis.ResponseError) and not keep_errors:
            raise reply
    return replies


def _pipeline(commands: Sequence[Sequence[Any]]) -> Call:
    """A call that sends commands together, on one connection; errors come among the replies."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return pipeline.execute(raise_on_error=False)

    return call


def broker_time() -> Operation[float]:
    """The broker's clock, in Unix seconds."""
    seconds, microseconds = yield lambda client: client.time()
    return float(seconds + microseconds / 1e6)


def set_if_absent(key: str, value: str, life_s: float) -> Call:
    """Set a string that expires after ``life_s``; the call answers None where there is one already."""
    return lambda client: client.set(key, value, nx=True, px=round(life_s * 1000))


def zrem(key: str, members: Sequence[str]) -> Call:
    return lambda client: client.zrem(key, *members)


def hgetall_many(ids: Sequence[str], key: Callable[[str], str] = routing.job_key) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for one in ids:
            pipeline.hgetall(key(one))
        return pipeline.execute()

    return call


def pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
