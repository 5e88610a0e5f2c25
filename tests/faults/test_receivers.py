"""Callback receivers that are down, slow, redirecting, or gone do not slow down jobs."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from support.cluster import Cluster
from support.receiver import Receiver

from latentline import records

Figure = Callable[..., None]


def spans(cluster: Cluster, ids: list[str]) -> float:
    """Median seconds from start to end of these jobs."""
    return statistics.median((r.finished_at or 0) - (r.started_at or 0) for r in cluster.finish(ids))


def states(cluster: Cluster) -> dict[str, int]:
    found = [one["status"] for one in records.run(cluster.redis, records.callbacks(limit=1000))]
    return {status: found.count(status) for status in set(found)}


def test_every_job_is_told_once(cluster: Cluster, receiver: Receiver, figure: Figure) -> None:
    """Also if the process that delivers is killed half-way."""
    cluster.start_worker()
    first = cluster.start_callbacks()
    ids = cluster.submit(20, num_inference_steps=5, callback={"url": receiver.url})
    cluster.until(lambda: len(receiver.answered) >= 5)
    cluster.kill(first)
    cluster.start_callbacks()
    cluster.finish()
    cluster.until(lambda: len(receiver.answered) == len(ids))
    cluster.until(lambda: states(cluster) == {"delivered": len(ids)})
    ended = cluster.check_invariants()
    assert {body["data"]["id"] for body in receiver.bodies} == set(ids)
    figure("the process that delivers callbacks is killed", jobs=len(ids), ids_delivered=len(receiver.answered), ended=ended)


@pytest.mark.parametrize(
    ("fault", "status", "delay_s", "headers", "expected"),
    [
        ("receiver answers 500", 500, 0.0, {}, "pending"),
        ("receiver is slow (10 s)", 204, 10.0, {}, "delivered"),
        ("receiver redirects", 302, 0.0, {"location": "http://127.0.0.1:9/"}, "pending"),
        ("receiver answers 410", 410, 0.0, {}, "gone"),
        ("receiver is down", 0, 0.0, {}, "pending"),
    ],
)
def test_a_bad_receiver_leaves_jobs_as_fast_as_they_are(
    cluster: Cluster, receiver: Receiver, figure: Figure, fault: str, status: int, delay_s: float, headers: dict[str, str], expected: str
) -> None:
    cluster.start_worker()
    cluster.start_callbacks()
    alone = spans(cluster, cluster.submit(8, num_inference_steps=20))
    url = receiver.url if status else "http://127.0.0.1:9/hook"  # nothing listens there
    receiver.status, receiver.delay_s, receiver.headers = status, delay_s, headers
    told = spans(cluster, cluster.submit(8, num_inference_steps=20, callback={"url": url}))
    cluster.until(lambda: states(cluster) == {expected: 8})
    ended = cluster.check_invariants()
    figure(fault, callbacks=states(cluster), job_span_vs_without=round(told / alone, 2), ended=ended)
    if status == 302:
        assert set(receiver.seen.values()) == {1}, "a redirect was followed"
