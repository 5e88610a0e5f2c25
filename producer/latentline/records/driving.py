"""How operations on Redis are written once and driven by a blocking client or an asyncio one.

An operation is a generator that yields Redis calls and returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import redis
import redis.asyncio

from latentline import routing
from latentline.errors import BrokerUnavailable

T = TypeVar("T")
Call = Callable[[Any], Any]
Operation = Generator[Call, Any, T]
# A broker that is away, that has become a replica, or that is full.
UNAVAILABLE = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError, OSError)


def run(client: redis.Redis, operation: Operation[T]) -> T:
    """Drive an operation with a blocking client.

    Raises:
        BrokerUnavailable: Redis does not answer.
    """
    try:
        call = operation.send(None)
        while True:
            try:
                value = call(client)
            except redis.ResponseError as error:
                call = operation.throw(error)  # the operation may know what to make of a refusal
            else:
                call = operation.send(value)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise _unavailable(error) from error
    except redis.ResponseError as error:
        if refused := _refused(error):
            raise refused from error
        raise


async def arun(client: redis.asyncio.Redis, operation: Operation[T]) -> T:
    """Drive an operation with an asyncio client; raises as :func:`run`."""
    try:
        call = operation.send(None)
        while True:
            try:
                value = await call(client)
            except redis.ResponseError as error:
                call = operation.throw(error)  # the operation may know what to make of a refusal
            else:
                call = operation.send(value)
    except StopIteration as done:
        result: T = done.value
        return result
    except UNAVAILABLE as error:
        raise _unavailable(error) from error
    except redis.ResponseError as error:
        if refused := _refused(error):
            raise refused from error
        raise


def _refused(error: redis.ResponseError) -> BrokerUnavailable | None:
    """A refusal that is the broker's state or settings, and not this system's mistake. Within scripts the reason stands further back."""
    if isinstance(error, redis.exceptions.NoPermissionError) or "NOPERM" in str(error) or "ACL failure" in str(error):
        return BrokerUnavailable("the broker does not let the user of LATENTLINE_REDIS_URL do this: see deploy/valkey/users.acl")
    if "MISCONF" in str(error):
        return BrokerUnavailable("the broker cannot write to its disk and refuses changes")
    return None


def _unavailable(error: Exception) -> BrokerUnavailable:
    """What is the matter, without the text of the error: it may hold a name or an address."""
    if isinstance(error, redis.AuthenticationError):
        return BrokerUnavailable("the broker refuses the user or the password of LATENTLINE_REDIS_URL")
    if "certificate verify failed" in str(error):
        return BrokerUnavailable("the broker's certificate is not trusted: see ssl_ca_certs in LATENTLINE_REDIS_URL")
    return BrokerUnavailable(f"the broker does not answer as it should: {type(error).__name__}")


def zrem(key: str, members: Sequence[str]) -> Call:
    return lambda client: client.zrem(key, *members)


def hgetall_many(ids: Sequence[str], key: Callable[[str], str] = routing.job_key) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for one in ids:
            pipeline.hgetall(key(one))
        return pipeline.execute()

    return call


def field_of(job_ids: Sequence[str], field: str) -> Call:
    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hget(routing.job_key(job_id), field)
        return pipeline.execute()

    return call


def pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
