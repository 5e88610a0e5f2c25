"""``python -m benchmarks.checkpoints``: what checkpoints cost, the same load with and without them, in one process.

A real broker, the worker's own heartbeat, the bundled model. Rounds with and without alternate, because a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentline import records
from latentline.connection import connect
from latentline.jobs import JobRequest, resolve
from latentline.records import Records
from latentline_worker.embedded.broker import Broker
from latentline_worker.engine.checkpoint import SHARE
from latentline_worker.engine.engine import Engine
from latentline_worker.generate.leases import Leases
from latentline_worker.models import bundled_model
from latentline_worker.models.base import Family

from . import trace
from .runners import to_work
from .trace import Job

ROUNDS = 3
NUM_JOBS = 24
CHECKPOINT_S = 1.0  # the workers' default
LEASE_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    family = bundled_model.load(torch.device("cpu"), torch.float32)
    jobs = trace.closed(NUM_JOBS, seed=3, steps=(20, 50))
    without, with_them = [], []
    with tempfile.TemporaryDirectory(prefix="latentline-") as folder:
        broker = Broker(Path(folder), "secret")
        broker.start()
        try:
            store = Records(connect(broker.url))
            for _ in range(ROUNDS):
                without.append(run(family, store, broker.url, jobs, None))
                with_them.append(run(family, store, broker.url, jobs, CHECKPOINT_S))
        finally:
            broker.stop()
    figures = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "jobs": NUM_JOBS,
        "rounds": ROUNDS,
        "share": round(statistics.median(one["share"] for one in with_them), 4),
        "aim": SHARE,
        "seconds_between_two_of_a_job": round(statistics.median(one["between_s"] for one in with_them), 2),
        "throughput_vs_without": round(
            statistics.median(one["took_s"] for one in without) / statistics.median(one["took_s"] for one in with_them), 3
        ),
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(family: Family, store: Records, url: str, jobs: Sequence[Job], checkpoint_s: float | None) -> dict[str, Any]:
    """Run all jobs at once on a fresh engine, and measure the time, and the checkpoints' share of it."""
    engine = Engine([family], checkpoint_s=checkpoint_s)
    engine.warm_up()
    leases = Leases(store, LEASE_S, checkpoint_schedule=engine.checkpoint_schedule)
    client = connect(url)
    accepted = records.run(client, records.submit([resolve(JobRequest.parse({"prompt": job.prompt})) for job in jobs], 600))
    claims = [store.claim(record.id, "benchmark", LEASE_S) for record in accepted]
    requests, held = [], contextlib.ExitStack()
    started = time.perf_counter()
    for claim, job in zip(claims, jobs, strict=True):
        assert claim is not None  # there is no other worker
        leased = held.enter_context(leases.hold(claim))
        requests.append(engine.submit(to_work(family, job, family.info.default_width)))
        leased.attach(requests[-1])
    leases.start()
    engine.start()
    for request in requests:
        request.result()
    took_s = time.perf_counter() - started
    leases.stop()
    held.close()
    engine.stop()
    client.close()
    schedule = engine.checkpoint_schedule
    if schedule is None:
        return {"took_s": took_s}
    return {"took_s": took_s, "share": schedule.total_s / took_s, "between_s": took_s * len(jobs) / max(1, schedule.num_taken)}


if __name__ == "__main__":
    main()
