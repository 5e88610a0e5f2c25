"""Redis connections that give up in time: a dead broker is an error within five seconds, never a hang."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

# One retry, on a fresh connection: enough for a connection that died while idle. Two tries of two seconds to
# connect stay under five.
OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": 2,
    "socket_timeout": 4,
    "health_check_interval": 15,
}


def connect(url: str) -> redis.Redis:
    """A client for one process; connects on first use."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 1), **OPTIONS)


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for asyncio."""
    return redis.asyncio.Redis.from_url(url, retry=AsyncRetry(NoBackoff(), 1), **OPTIONS)
