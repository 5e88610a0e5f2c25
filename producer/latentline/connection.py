"""Redis connections that give up in time: a dead broker is an error within five seconds, never a hang."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

# One try: retries of a command and of its connection multiply, and a broker that hangs would be noticed after 16 s
# and not after 5. A connection that died while idle is found by the health check.
OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": 2,
    "socket_timeout": 2.5,
    "health_check_interval": 15,
    "protocol": 2,  # saves a handshake that would wait for a hung broker a second time
}


def connect(url: str) -> redis.Redis:
    """A client for one process; connects on first use."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **OPTIONS)


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for asyncio."""
    return redis.asyncio.Redis.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **OPTIONS)
