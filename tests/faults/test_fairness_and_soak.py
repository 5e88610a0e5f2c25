"""Many jobs: of one tenant against another's, and for long."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import psutil
from support.cluster import Cluster
from support.receiver import Receiver

from latentline.jobs import Status

Figure = Callable[..., None]


def p95(cluster: Cluster, ids: list[str]) -> float:
    waits = sorted((r.finished_at or 0) - r.created_at for r in cluster.finish(ids, 600))
    return waits[int(0.95 * (len(waits) - 1))]


def test_a_busy_tenant_does_not_starve_a_quiet_one(cluster: Cluster, full: bool, figure: Figure) -> None:
    cluster.start_worker()
    cluster.submit(2, num_inference_steps=2)  # the first jobs after a start are slower
    cluster.finish()
    alone = p95(cluster, cluster.submit(10, num_inference_steps=10, tenant="quiet"))
    busy = cluster.submit(1000 if full else 100, num_inference_steps=10, tenant="busy")
    beside = p95(cluster, cluster.submit(10, num_inference_steps=10, tenant="quiet"))
    left = sum(not cluster.get(job_id).status.terminal for job_id in busy)
    cluster.finish(timeout_s=900)
    figure(
        "1,000 jobs of one tenant against 10 of another",
        busy_jobs=len(busy),
        busy_left_when_the_quiet_was_done=left,
        p95_alone_s=round(alone, 2),
        p95_beside_s=round(beside, 2),
        ratio=round(beside / alone, 2),
        ended=cluster.check_invariants(),
    )
    assert left > len(busy) / 2, "the quiet tenant waited for the busy one"
    assert not full or beside <= 2 * alone, "judged on a machine that does nothing else"


def growth(sizes: list[int]) -> float:
    """The last quarter of a process's memory against the second, when all its parts had come to life."""
    quarter = len(sizes) // 4
    return statistics.median(sizes[-quarter:]) / statistics.median(sizes[quarter : 2 * quarter]) if quarter else 1.0


def test_soak(cluster: Cluster, receiver: Receiver, full: bool, figure: Figure) -> None:
    """Short jobs, two workers, random faults; memory stays flat."""
    jobs, batch = (10_000, 250) if full else (60, 30)
    rng = random.Random(1)
    cluster.start_worker(FAULT_STEP_S="0")
    cluster.start_worker(FAULT_STEP_S="0")
    cluster.start_callbacks()
    resident: dict[int, list[int]] = {}
    faults = 0
    started = time.monotonic()
    told = 0
    while len(cluster.accepted) < jobs:
        callback = {"callback": {"url": receiver.url}} if rng.random() < 0.2 else {}
        told += batch if callback else 0
        ids = cluster.submit(batch, num_inference_steps=rng.randint(1, 4), guidance_scale=rng.choice([1.0, 5.0]), **callback)
        fault = rng.choice(["kill", "reset", "half-open", "none", "none", "none", "none", "none"])
        if fault == "kill":
            cluster.kill(rng.choice(cluster.workers()))
            cluster.start_worker(FAULT_STEP_S="0")
        elif fault == "reset":
            cluster.redis_proxy.reset()
        elif fault == "half-open":
            cluster.redis_proxy.half_open()
        faults += fault != "none"
        cluster.finish(ids, 600)
        for child in cluster.alive():
            resident.setdefault(child.process.pid, []).append(psutil.Process(child.process.pid).memory_info().rss)
    took = time.monotonic() - started
    cluster.until(lambda: len(receiver.answered) == told)
    ended = cluster.check_invariants((Status.SUCCEEDED,))
    lives = [sizes for sizes in resident.values() if len(sizes) >= 8]
    grown = max(lives, key=growth, default=[1])
    figure(
        "soak: short jobs, two workers, random faults",
        jobs=len(cluster.accepted),
        faults=faults,
        ended=ended,
        callbacks_told_once=len(receiver.answered),
        jobs_per_s=round(len(cluster.accepted) / took, 1),
        largest_memory_growth=round(growth(grown), 3),
        memory_of_that_process_mb=[size >> 20 for size in grown],
    )
    assert growth(grown) < 1.15, "memory grows"
