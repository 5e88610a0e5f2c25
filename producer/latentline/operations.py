"""Operations on Redis that are written once and serve synchronous and asynchronous callers.

An operation is a generator: it yields calls, gets their answers, and returns its result. A call takes the redis client
and returns a value (``redis.Redis``) or an awaitable (``redis.asyncio.Redis``); only the drivers care which.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from redis import exceptions

from .errors import BrokerUnavailable

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Blocking:
    """A call that is not for Redis and blocks: asynchronous callers run it in a thread."""

    call: Callable[[], Any]


Call: TypeAlias = Callable[[Any], Any] | Blocking
Op: TypeAlias = Generator[Call, Any, T]


def run(redis: Any, op: Op[T]) -> T:
    """Drive an operation with a ``redis.Redis``.

    Raises:
        BrokerUnavailable: Redis does not answer, or cannot accept writes.
    """
    answer: Any = None
    while True:
        try:
            call = op.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        with _broker_errors():
            answer = call.call() if isinstance(call, Blocking) else call(redis)


async def arun(redis: Any, op: Op[T]) -> T:
    """Drive an operation with a ``redis.asyncio.Redis``; raises as :func:`run` does."""
    answer: Any = None
    while True:
        try:
            call = op.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        with _broker_errors():
            answer = await (asyncio.to_thread(call.call) if isinstance(call, Blocking) else call(redis))


def synchronous(op: Callable[Concatenate[Any, P], Op[T]]) -> Callable[Concatenate[Any, P], T]:
    """An operation of ``self._operations`` as a method that runs it on ``self._redis``."""

    @wraps(op)
    def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(self._redis, op(self._operations, *args, **kwargs))

    return method


def asynchronous(op: Callable[Concatenate[Any, P], Op[T]]) -> Callable[Concatenate[Any, P], Awaitable[T]]:
    """As :func:`synchronous`, for a ``redis.asyncio.Redis``."""

    @wraps(op)
    async def method(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return await arun(self._redis, op(self._operations, *args, **kwargs))

    return method


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, exceptions.OutOfMemoryError) as error:
        raise BrokerUnavailable(f"the broker does not answer: {error}") from error
