"""How long a worker waits at the broker for its next message."""

from __future__ import annotations

import kombu.transport.redis

from .fairness import LeastServedFirst

IDLE_S = 2.0  # of one BRPOP while every queue may be taken; SIGTERM waits for it, and kombu's socket_timeout has to be longer
CAPPED_S = 0.25  # while a shard is at its in-flight limit: BRPOP leaves its queues out until it returns


class BlockingChannel(kombu.transport.redis.Channel):  # type: ignore[misc]
    """kombu's channel, with a BRPOP that waits as long as the choice of queues holds.

    kombu has one time limit for all calls. Its own one, set to ``IDLE_S`` by the option ``polling_interval``, remains what it
    judges half-open connections by.
    """

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Send BRPOP for the queues that may be taken now. What was received before counts already, see transport/app.py."""
        order = self._queue_cycle
        capped = isinstance(order, LeastServedFirst) and order.capped
        super()._brpop_start(CAPPED_S if capped else timeout)
