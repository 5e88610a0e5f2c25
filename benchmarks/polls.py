"""``python -m benchmarks.polls``: what one poll of a job costs the API, in CPU time and in round trips to the broker.

The API runs in a process of its own on a real Valkey, without keys, with keys, and with traces (of which polls have none), side by
side. One client on one kept connection polls a queued job, and an ended one with eight pictures; each answered whole (200) and as
unchanged (304). CPU time is that of the API's process alone; commands are counted by the broker.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from latentline import records
from latentline.connection import connect
from latentline.jobs import JobRequest, resolve
from latentline.keys import NewKey
from latentline.testing import FakeImages, FakeWorker
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.process import clean_env

from .broker import without_store

POLLS = 1000  # of each kind in one round
WARM_UP = 200
IMAGES = 8


# What each API process is given; nobody listens at the endpoint, since nothing is sent.
VARIANTS = {
    "none": {"LATENTLINE_AUTH": "none"},
    "keys": {"LATENTLINE_AUTH": "keys"},
    "traces": {"LATENTLINE_AUTH": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
}


@contextmanager
def api(url: str, variant: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """An API process on a free port: its URL and the process."""
    env = clean_env(**without_store(url), **VARIANTS[variant])
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    log = folder / f"api-{variant}.log"
    with log.open("w") as out:
        child = subprocess.Popen([sys.executable, "-m", "latentline.cli", "api", "--port", "0"], env=env, stdout=out, stderr=out)
    try:
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            if child.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        yield found[0], psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait()


def measure(http: httpx.Client, process: psutil.Process, broker: redis.Redis, path: str, etag: str | None, polls: int) -> dict[str, float]:
    """CPU time and broker calls of one poll."""
    headers = {"If-None-Match": etag} if etag else {}
    expected = 304 if etag else 200

    def poll() -> None:
        answer = http.get(path, headers=headers)
        assert answer.status_code == expected, answer.text

    for _ in range(WARM_UP):
        poll()
    calls, cpu, began = _reads(broker), process.cpu_times(), time.perf_counter()
    for _ in range(polls):
        poll()
    took, now = time.perf_counter() - began, process.cpu_times()
    return {
        "cpu_ms": 1000 * (now.user + now.system - cpu.user - cpu.system) / polls,
        "latency_ms": 1000 * took / polls,
        "round_trips": (_reads(broker) - calls) / polls,
    }


def _reads(broker: Any) -> int:
    """Times that the broker has read from a client: one for each round trip, as the commands of one come together."""
    return int(broker.info("stats")["total_reads_processed"])


def jobs(client: redis.Redis) -> dict[str, str]:
    """A queued job, and an ended one with eight pictures."""
    worker = FakeWorker(client, FakeImages())
    worker.announce()

    def submit(**fields: Any) -> str:
        return str(records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat", **fields}))], 6000))[0].id)

    ended = submit(num_images=IMAGES, num_inference_steps=2)
    worker.run_all()
    return {"queued": submit(), f"ended, {IMAGES} images": ended}


def run(rounds: int, polls: int) -> list[dict[str, Any]]:
    """Every case, in turns; the medians of all rounds."""
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, Broker(Path(name) / "broker", "secret") as broker, closing(connect(broker.url)) as client:
        ids = jobs(client)
        key, _ = records.run(client, records.create_key(NewKey.parse(tenant="default", scopes=("read",), limits={})))
        with ExitStack() as stack:
            running = {variant: stack.enter_context(api(broker.url, variant, Path(name))) for variant in VARIANTS}
            for _ in range(rounds):
                for variant, (url, process) in running.items():
                    headers = {"Authorization": f"Bearer {key}"} if variant == "keys" else {}
                    with httpx.Client(base_url=url, headers=headers, trust_env=False) as http:
                        for job, job_id in ids.items():
                            path = f"/v1/jobs/{job_id}"
                            for etag in (None, http.get(path).headers["etag"]):
                                case = (variant, job, 304 if etag else 200)
                                found.setdefault(case, []).append(measure(http, process, client, path, etag, polls))
    return [
        {"variant": variant, "job": job, "status": status, **{name: _spread([one[name] for one in runs]) for name in runs[0]}}
        for (variant, job, status), runs in found.items()
    ]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--polls", type=int, default=POLLS, help="of each case in each round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = run(args.rounds, args.polls)
    if args.json:
        args.json.write_text(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), "rows": rows}, indent=2))
    for row in rows:
        cpu, trips, latency = (row[name] for name in ("cpu_ms", "round_trips", "latency_ms"))
        spread = f"{cpu['median']:.2f} ms ({cpu['least']:.2f} to {cpu['most']:.2f})"
        case = f"{row['variant']:<6} {row['job']:<17} {row['status']}"
        print(f"{case}  CPU {spread}, {trips['median']:.2f} round trips, {latency['median']:.2f} ms")
    plain, traced = (sum(row["cpu_ms"]["median"] for row in rows if row["variant"] == variant) for variant in ("none", "traces"))
    print(f"with traces, all cases together: {traced / plain:.3f} times the CPU time")


if __name__ == "__main__":
    main()
