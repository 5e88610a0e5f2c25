"""``python -m benchmarks.listeners``: what event streams and polls cost the API, and what they cost denoising beside them.

A real Valkey and one real API process, with keys. Idle: so many streams, each of a job of its own that waits. Lag: from the broker's
time of an event to its arrival at each listener, while jobs take steps. Beside: the whole stack with the bundled model, the same load
of jobs alone and beside polls at full speed and listeners, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

NUM_IDLE = 2000
NUM_LISTENERS = 500
WATCHED_S = 30.0
NUM_RUNNING = 50  # jobs that take steps while the lag is measured; ten listeners for each
STEP_S = 0.3
NUM_STEPS = 60
NUM_LOAD = 24  # jobs of the closed load
POLLERS = 4  # connections that poll without a pause
OPENED_AT_ONCE = 50


@contextmanager
def api(url: str, folder: Path, **env: str) -> Iterator[tuple[str, psutil.Process]]:
    """An API process on a loopback port, and a look at it."""
    from latentline_worker.embedded.process import Child, clean_env, free_port

    port = free_port()
    store = {"LATENTLINE_S3_ENDPOINT_URL": "http://127.0.0.1:9", "LATENTLINE_S3_ACCESS_KEY_ID": "x", "LATENTLINE_S3_SECRET_ACCESS_KEY": "x"}
    command = [sys.executable, "-m", "latentline.cli", "api", "--port", str(port)]
    child = Child("api", command, folder / "api.log", clean_env(LATENTLINE_REDIS_URL=url, **store, **env))

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
        return False

    child.wait_until(answers, 60)
    try:
        yield f"127.0.0.1:{port}", psutil.Process(child.process.pid)
    finally:
        child.stop()


class Opening:
    """Streams that are being opened, some at a time, and those that have told their first event."""

    def __init__(self) -> None:
        self.some = asyncio.Semaphore(OPENED_AT_ONCE)
        self.done = 0


async def stream(host: str, path: str, key: str, opening: Opening) -> AsyncIterator[dict[str, Any]]:
    """The events of one stream after its first, over a plain socket: 2,000 of them must not cost the client more than the server."""
    async with opening.some:
        reader, writer = await asyncio.open_connection(*host.split(":"))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{path}: {status!r}")
        while not (await reader.readline()).startswith(b"data: "):
            pass
        opening.done += 1
    try:
        while line := await reader.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        writer.close()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def idle(host: str, key: str, job_ids: Sequence[str], process: psutil.Process, client: Any) -> dict[str, float]:
    """CPU of the API in per cent of a core, and connections to the broker, while streams of jobs that wait are open."""
    opening = Opening()
    before = client.info("clients")["connected_clients"]

    async def follow(job_id: str) -> None:
        async for _ in stream(host, f"/v1/jobs/{job_id}/events", key, opening):
            pass

    tasks = [asyncio.create_task(follow(job_id)) for job_id in job_ids]
    while opening.done < len(job_ids):
        await asyncio.sleep(0.2)
    await asyncio.sleep(5)
    began, at, broker = cpu_s(process), time.monotonic(), client.info("cpu")
    await asyncio.sleep(WATCHED_S)
    wall = time.monotonic() - at
    after, connections = client.info("cpu"), client.info("clients")["connected_clients"] - before
    spent = cpu_s(process) - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    names = ("used_cpu_sys", "used_cpu_user")
    return {
        "idle: CPU of the API, % of a core": 100 * spent / wall,
        "idle: CPU of the broker, % of a core": 100 * sum(after[name] - broker[name] for name in names) / wall,
        "idle: further connections to the broker": connections,
    }


def run_jobs(url: str, job_ids: Sequence[str]) -> None:
    """Take the jobs through their steps, in the time that a worker would need."""
    from latentline.connection import connect
    from latentline.jobs import Phase, Status
    from latentline.records import Beat, Records

    store = Records(connect(url), 600)
    claims = [store.claim(job_id, "benchmark", 600) for job_id in job_ids]
    for step in range(1, NUM_STEPS + 1):
        for claim in claims:  # jobs do not step at the same moment
            store.beat([Beat(claim.record.id, claim.token, Phase.DENOISING, step, 600)])
            time.sleep(STEP_S / len(claims))
    for claim in claims:
        store.settle(claim.record.id, claim.token, Status.SUCCEEDED)


async def lag(host: str, key: str, job_ids: Sequence[str], url: str, process: psutil.Process) -> dict[str, float]:
    """Seconds from an event to its arrival, over all listeners."""
    opening, lags = Opening(), []
    missing: list[int] = []

    async def follow(mine: Sequence[str]) -> None:
        num_ended = 0
        async for data in stream(host, f"/v1/events?jobs={','.join(mine)}", key, opening):
            if data["type"] not in ("job.queued", "job.position", "end"):
                lags.append(time.time() - data["at"])
            num_ended += data["type"] == "job.succeeded"
            if num_ended == len(mine):
                return
        missing.append(len(mine) - num_ended)

    tasks = [asyncio.create_task(follow([job_ids[i % len(job_ids)]])) for i in range(NUM_LISTENERS)]
    while opening.done < NUM_LISTENERS:
        await asyncio.sleep(0.2)
    await asyncio.sleep(2)
    began, at = cpu_s(process), time.monotonic()
    worker = multiprocessing.get_context("spawn").Process(target=run_jobs, args=(url, job_ids))  # in a process of its own
    worker.start()
    await asyncio.gather(*tasks)
    spent, wall = cpu_s(process) - began, time.monotonic() - at
    worker.join()
    lags.sort()
    return {
        "lag: events a second, over all listeners": len(lags) / wall,
        "lag: p50, s": lags[len(lags) // 2],
        "lag: p99, s": lags[len(lags) * 99 // 100],
        "lag: largest, s": lags[-1],
        "lag: CPU of the API, % of a core": 100 * spent / wall,
        "lag: events that did not come": sum(missing),
    }


def measure_streams() -> dict[str, float]:
    """Idle listeners and lag."""
    from latentline import records
    from latentline.connection import connect
    from latentline.jobs import JobRequest, resolve
    from latentline.keys import NewKey
    from latentline_worker.embedded.broker import Broker

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = Broker(folder / "broker", "password")
        broker.start()
        client = connect(broker.url)
        try:
            key, _ = records.run(client, records.create_key(NewKey.parse(tenant="default")))

            def submit(count: int, num_steps: int) -> list[str]:
                request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": num_steps, "tenant": "default"})
                return [one.id for one in records.run(client, records.submit([resolve(request)] * count, 600))]  # type: ignore[union-attr]

            with api(broker.url, folder, LATENTLINE_AUTH="keys") as (host, process):
                found = asyncio.run(idle(host, key, submit(NUM_IDLE, 2), process, client))
                found |= asyncio.run(lag(host, key, submit(NUM_RUNNING, NUM_STEPS), broker.url, process))
            return found
        finally:
            client.close()
            broker.stop()


async def crowd(host: str, job_ids: Sequence[str], stop: threading.Event) -> int:
    """Poll at full speed and listen, until told to stop; the number of polls."""
    opening, polls = Opening(), 0

    async def follow(i: int) -> None:
        with contextlib.suppress(RuntimeError):
            async for _ in stream(host, f"/v1/events?jobs={','.join(job_ids[i % len(job_ids) :][:10])}", "", opening):
                pass

    async def poll(i: int) -> None:
        nonlocal polls
        reader, writer = await asyncio.open_connection(*host.split(":"))
        while not stop.is_set():
            writer.write(f"GET /v1/jobs/{job_ids[i % len(job_ids)]} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            length = 0
            while (line := await reader.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            await reader.readexactly(length)
            polls, i = polls + 1, i + 1
        writer.close()

    listeners = [asyncio.create_task(follow(i)) for i in range(NUM_LISTENERS)]
    await asyncio.gather(*(poll(i) for i in range(POLLERS)))
    for task in listeners:
        task.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)
    return polls


def measure_beside(rounds: int) -> dict[str, float]:
    """Jobs a second of the whole stack, alone and beside a crowd, in turns."""
    from latentline import Client
    from latentline_worker.embedded.stack import Stack

    alone, beside, polled = [], [], []
    with tempfile.TemporaryDirectory() as name, Stack(Path(name)) as stack, Client(stack.settings) as client:

        def load() -> tuple[list[str], float]:
            requests: list[Any] = [{"prompt": "a cat", "num_inference_steps": 20, "seed": seed} for seed in range(NUM_LOAD)]
            from latentline.jobs import JobRequest

            began = time.monotonic()
            ids = [one.id for one in client.submit_many([JobRequest.parse(one) for one in requests])]  # type: ignore[union-attr]
            return ids, began

        def finish(ids: Sequence[str], began: float) -> float:
            for job_id in ids:
                client.wait(job_id, timeout_s=600, check=True)
            return len(ids) / (time.monotonic() - began)

        finish(*load())  # the worker is warm from here on
        for _ in range(rounds):
            alone.append(finish(*load()))
            ids, began = load()
            stop, counted = threading.Event(), []
            thread = threading.Thread(
                target=lambda ids=ids, stop=stop, counted=counted: counted.append(  # type: ignore[misc]
                    asyncio.run(crowd(stack.url.removeprefix("http://"), ids, stop))
                )
            )
            thread.start()
            beside.append(finish(ids, began))
            seconds = time.monotonic() - began
            stop.set()
            thread.join()
            polled.append(counted[0] / seconds)
    return {
        "beside: jobs a second alone": statistics.median(alone),
        "beside: jobs a second beside the crowd": statistics.median(beside),
        "beside: share that is left": statistics.median(b / a for a, b in zip(alone, beside, strict=True)),
        "beside: polls a second": statistics.median(polled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.listeners", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of the load beside a crowd; 0 leaves it out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure_streams()
    if args.rounds:
        found |= measure_beside(args.rounds)
    for name, value in found.items():
        print(f"{name:<45} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
