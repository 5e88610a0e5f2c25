"""Redis clients that give up soon: a broker that is down is an error within seconds, never a hang."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from .errors import ConfigurationError

CONNECT_TIMEOUT_S = 2.0
# With the connect timeout less than the 5 s in which a submission must fail; longer than any blocking read
# (records.MAX_BLOCK_MS).
SOCKET_TIMEOUT_S = 2.5
HEALTH_CHECK_INTERVAL_S = 5  # without it a half-open connection is noticed only by a failing command


def _options(retry: Any) -> dict[str, Any]:
    return {
        "decode_responses": True,
        "protocol": 2,  # replies have one shape on every version of redis-py and of the server
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_INTERVAL_S,
        # redis-py 8 retries ten times by default, and nests the retries of a health check in those of a command.
        # The pool replaces connections that the server has closed anyway.
        "retry": retry,
    }


def connect(url: str) -> redis.Redis:
    """A client for synchronous callers; nothing is opened yet.

    Raises:
        ConfigurationError: the URL is not one of a Redis server.
    """
    try:
        client: redis.Redis = redis.Redis.from_url(url, **_options(Retry(NoBackoff(), 0)))
    except ValueError as error:
        raise _bad_url(error) from None
    return client


def connect_async(url: str) -> redis.asyncio.Redis:
    """As :func:`connect`, for asynchronous callers."""
    try:
        client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, **_options(AsyncRetry(NoBackoff(), 0)))
    except ValueError as error:
        raise _bad_url(error) from None
    return client


def _bad_url(error: ValueError) -> ConfigurationError:
    return ConfigurationError(f"LATENTLINE_REDIS_URL is not the URL of a Redis server: {error}")
