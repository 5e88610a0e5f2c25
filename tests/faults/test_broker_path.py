"""The path between workers and broker: scripts that are forgotten, turns whose holder dies, many jobs on a slow broker, cancels."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from support.cluster import Cluster

from latentline import routing
from latentline.jobs import Status

Figure = Callable[..., None]


def test_scripts_that_the_broker_forgets_are_sent_again(cluster: Cluster, figure: Figure) -> None:
    """Any call may be answered NOSCRIPT: after a restart, a failover, or SCRIPT FLUSH as here."""
    cluster.start_worker()
    ended = threading.Event()
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        while not ended.wait(0.01):
            cluster.redis.script_flush()
            flushes += 1

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        ids = cluster.submit(12, num_inference_steps=40, preview_every=5)
        cluster.until(lambda: cluster.running(step=3))
        cancelled = cluster.running()[0].id
        cluster.client.cancel(cancelled)
        done = cluster.finish()
    finally:
        ended.set()
        thread.join()
    counts = cluster.check_invariants((Status.SUCCEEDED, Status.CANCELLED))
    figure("SCRIPT FLUSH at every moment", jobs=len(ids), flushes=flushes, ended=counts)
    assert flushes > 10 and max(record.attempt for record in done) == 1


def test_a_worker_that_is_killed_in_its_turn_delays_maintenance_only_a_little(cluster: Cluster, full: bool, figure: Figure) -> None:
    """Nobody leads: the next turn goes to whoever tries first. Each round kills the process that has the turn at that moment."""
    key = routing.turn_key(cluster.model.name)

    def holder() -> str | None:
        return cluster.redis.get(key)

    kills, longest_s = 10 if full else 2, 0.0
    for _ in range(2):
        cluster.start_worker()
    cluster.submit(4, num_inference_steps=150)
    for _ in range(kills):
        cluster.start_worker()
        killed = cluster.until(holder)
        os.kill(int(killed.rpartition(":")[2]), signal.SIGKILL)
        since = time.monotonic()
        cluster.until(lambda killed=killed: (found := holder()) and found != killed)  # type: ignore[misc]
        longest_s = max(longest_s, time.monotonic() - since)
    cluster.finish()
    figure(
        "the worker that has the turn at maintenance is killed",
        kills=kills,
        longest_until_another_has_it_s=round(longest_s, 2),
        ended=cluster.check_invariants(),
    )
    assert not full or longest_s <= 3


def test_many_jobs_of_one_worker_on_a_slow_broker_keep_their_leases(cluster: Cluster, full: bool, figure: Figure) -> None:
    """Previews make each beat large, and everything that is sent to the broker takes longer."""
    number = 256 if full else 48
    cluster.start_worker(LATENTLINE_CONCURRENCY=str(number))
    cluster.redis_proxy.delay_s = 0.02
    cluster.submit(number, num_inference_steps=12, preview_every=2)
    most_in_flight = 0

    def ended() -> bool:
        nonlocal most_in_flight
        most_in_flight = max(most_in_flight, cluster.redis.zcard(routing.index_key("running")))
        return int(cluster.redis.zcard(routing.index_key("succeeded"))) == number

    cluster.until(ended, every_s=0.1)
    cluster.redis_proxy.delay_s = 0.0
    done = cluster.finish()
    most = max(record.attempt for record in done)
    figure("many jobs of one worker, 20 ms a packet", jobs=number, most_in_flight=most_in_flight, most_attempts=most,
           ended=cluster.check_invariants())  # fmt: skip
    assert most == 1


def test_a_cancel_reaches_a_running_job_at_once(cluster: Cluster, full: bool, figure: Figure) -> None:
    cluster.start_worker(LATENTLINE_LEASE_S="60", FAULT_STEP_S="0.1")  # a renewal would tell after 20 s
    ids = cluster.submit(10, num_inference_steps=150)
    cluster.until(lambda: len(cluster.running(step=3)) == len(ids))
    took = []
    for job_id in ids:
        since = time.monotonic()
        cluster.client.cancel(job_id)
        cluster.until(lambda job_id=job_id: cluster.get(job_id).status.terminal, every_s=0.002)  # type: ignore[misc]
        took.append(time.monotonic() - since)
    figure("cancel of a running job", most_s=round(max(took), 2), mean_s=round(sum(took) / len(took), 2),
           ended=cluster.check_invariants((Status.CANCELLED,)))  # fmt: skip
    assert not full or max(took) <= 1
