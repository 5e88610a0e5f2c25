"""Redis connections with time limits: a broker that does not answer is an error within five seconds."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

# No retries: those of a command and of its connection multiply, so that a broker that hangs would be noticed after 16 s
# instead of 5. The health check finds a connection that died while idle.
OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "socket_connect_timeout": 2,
    "socket_timeout": 2.5,
    "health_check_interval": 15,
    "protocol": 2,  # protocol 3 begins with a handshake, which would wait for a hung broker a second time
}


# Of one asyncio client. One is taken by the wait for events, and a script call takes a tenth of a millisecond of the broker.
MAX_CONNECTIONS = 24
POOL_TIMEOUT_S = 5  # how long a task waits for a connection: where hundreds begin at once, the last ones wait for their turn


def connect(url: str) -> redis.Redis:
    """A client for one process; connects on first use."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **OPTIONS)


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for asyncio. However many tasks use it at once, it has at most ``MAX_CONNECTIONS``; further ones wait for one."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url, max_connections=MAX_CONNECTIONS, timeout=POOL_TIMEOUT_S, retry=AsyncRetry(NoBackoff(), 0), **OPTIONS
    )
    return redis.asyncio.Redis.from_pool(pool)
