"""How long a worker waits at the broker for its next message."""

from __future__ import annotations

import kombu.transport.redis

from .fairness import LeastServedFirst

# Of one BRPOP while every queue may be taken. SIGTERM waits for it, and kombu's socket_timeout has to be longer.
IDLE_S = 2.0
# Of one while a shard is at its in-flight limit, as a fraction of the time for which messages are held: BRPOP leaves the shard's
# queues out until it returns, so the place of a job that ends stays empty for half of this on average. A worker that holds 16
# jobs sends about two of them a job, whether those take a second or a minute.
CAPPED_FRACTION = 0.025
MIN_CAPPED_S, MAX_CAPPED_S = 0.02, 0.25


def wait_s(capped: bool, mean_held_s: float | None) -> float:
    """How long one BRPOP waits, in seconds.

    Args:
        capped: whether a shard is at its in-flight limit.
        mean_held_s: how long this worker held its last messages; None before the first has ended.
    """
    if not capped:
        return IDLE_S
    return MAX_CAPPED_S if mean_held_s is None else min(max(CAPPED_FRACTION * mean_held_s, MIN_CAPPED_S), MAX_CAPPED_S)


class BlockingChannel(kombu.transport.redis.Channel):  # type: ignore[misc]
    """kombu's channel, with a BRPOP that waits as long as the choice of queues holds.

    kombu has one time limit for all calls. That one, set to ``IDLE_S`` by the option ``polling_interval``, remains what it
    judges half-open connections by.
    """

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Send BRPOP for the queues that may be taken now. What was received before counts already, see transport/app.py."""
        order = self._queue_cycle
        if timeout is None and isinstance(order, LeastServedFirst):
            timeout = min(wait_s(order.capped, order.mean_held_s), MAX_CAPPED_S if order.changing else IDLE_S)
        super()._brpop_start(timeout)
