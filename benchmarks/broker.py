"""``python -m benchmarks.broker``: what jobs and workers cost the broker, also of an earlier version beside this one.

A real Valkey, real worker processes whose device is a clock (:mod:`benchmarks.sleeping_worker`). The broker itself counts calls,
commands, bytes and its CPU time (INFO). ``--before CHECKOUT`` measures the code of that checkout in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]

LOAD_JOBS = 48
LOAD_STEPS = 20
LOAD_STEP_S = 0.3  # so that a job takes six seconds, as those of the demo do on a CPU
IDLE_S = 20.0
STACK = 5  # workers; what a further one costs is a quarter of what five cost above one
SUBMITTED = 500
DEPTHS = (1_000, 10_000, 200_000)
DEPTH_JOBS = 300  # done at each depth
FAST_STEP_S = 0.002
CHUNK = 500  # jobs of one submission
PATIENCE_S = 120.0
SCRIPT_CALLS = ("eval", "evalsha")


@dataclass(frozen=True)
class Count:
    """What the broker has counted since its start."""

    script_calls: float
    commands: float
    received_bytes: float
    sent_bytes: float
    cpu_ms: float
    at_s: float

    @classmethod
    def now(cls, client: Any) -> Count:
        """Read the counters. Reading them costs three commands and no script call."""
        calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in client.info("commandstats").items()}
        stats, cpu = client.info("stats"), client.info("cpu")
        return cls(
            sum(calls.get(name, 0) for name in SCRIPT_CALLS),
            sum(calls.values()),
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
            1000 * (cpu["used_cpu_sys"] + cpu["used_cpu_user"]),
            time.monotonic(),
        )

    def since(self, before: Count, jobs: float = 1.0) -> dict[str, float]:
        """What was added since ``before``, for each of ``jobs``."""
        return {
            "script calls": (self.script_calls - before.script_calls) / jobs,
            "commands": (self.commands - before.commands) / jobs,
            "KB received": (self.received_bytes - before.received_bytes) / jobs / 1000,
            "KB sent": (self.sent_bytes - before.sent_bytes) / jobs / 1000,
            "broker CPU, ms": (self.cpu_ms - before.cpu_ms) / jobs,
        }


def without_store(url: str) -> dict[str, str]:
    """The LATENTLINE variables of processes that use this broker and store nothing."""
    store = dict.fromkeys(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "BUCKET", "REGION"), "x" * 20)
    return {
        "LATENTLINE_REDIS_URL": url,
        "LATENTLINE_S3_ENDPOINT_URL": "http://127.0.0.1:9",  # nothing listens there
        **{f"LATENTLINE_S3_{name}": value for name, value in store.items()},
    }


@contextmanager
def sleeping_workers(number: int, env: Mapping[str, str], log: Path) -> Iterator[None]:
    """So many processes of :mod:`benchmarks.sleeping_worker`; whether they are ready is for the caller to see."""
    env = {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(HERE / "benchmarks" / "sleeping_worker.py")]
    with log.open("a") as out:
        children = [subprocess.Popen(command, env=env, stdout=out, stderr=out) for _ in range(number)]
    try:
        yield
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


class Bench:
    """One broker, and the code of one checkout: this process imports it, see ``PYTHONPATH`` in :func:`run_code`."""

    def __init__(self, folder: Path) -> None:
        from latentline import Client
        from latentline.connection import connect
        from latentline.settings import Settings
        from latentline_worker.embedded.broker import Broker

        self._folder = folder
        self.broker = Broker(folder, "secret")
        self.broker.start()
        self.environment = without_store(self.broker.url)
        self.redis = connect(self.broker.url)
        self.redis.config_set("maxmemory", "0")  # the deepest queue needs more than the embedded broker takes
        make = getattr(Settings, "from_variables", None)
        os.environ.update(self.environment)
        self.client = Client(make(self.environment) if make else Settings())
        self.client.images.check = lambda: None  # there is no store

    def close(self) -> None:
        self.client.close()
        self.redis.close()
        self.broker.stop()

    @contextmanager
    def workers(self, number: int, step_s: float) -> Iterator[None]:
        """So many workers, once they take messages."""
        from latentline import routing

        self.redis.delete(routing.workers_key())
        env = {**os.environ, **self.environment, "STEP_S": str(step_s)}
        with sleeping_workers(number, env, self._folder / "workers.log"):
            until(lambda: self.redis.zcard(routing.workers_key()) == number, f"{number} workers")
            yield

    def submit(self, number: int) -> list[str]:
        """Submit so many jobs of one tenant; their ids."""
        from latentline.jobs import JobRequest

        ids: list[str] = []
        for first in range(0, number, CHUNK):
            one = {"model": "sleeping", "prompt": "a red apple on a green table", "num_inference_steps": LOAD_STEPS, "scheduler": "ddim"}
            requests = [JobRequest.parse(one) for _ in range(min(CHUNK, number - first))]
            ids += [outcome.id for outcome in self.client.submit_many(requests)]
        return ids

    def num_succeeded(self) -> int:
        from latentline import routing

        return int(self.redis.zcard(routing.index_key("succeeded")))


def until(holds: Callable[[], bool], what: str, every_s: float = 0.05) -> None:
    """Wait until something holds.

    Raises:
        SystemExit: it does not within ``PATIENCE_S``.
    """
    end = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"benchmarks.broker: waited {PATIENCE_S:g} s for {what}")
        time.sleep(every_s)


def load(bench: Bench) -> dict[str, float]:
    """The 48-job load: one tenant, 16 jobs in flight, progress at the default rate."""
    with bench.workers(1, LOAD_STEP_S):
        before = Count.now(bench.redis)
        bench.submit(LOAD_JOBS)
        until(lambda: bench.num_succeeded() >= LOAD_JOBS, "the load to end", every_s=0.5)
        return Count.now(bench.redis).since(before, LOAD_JOBS)


def idle(bench: Bench) -> dict[str, float]:
    """What one idle worker more costs in a second."""
    per_s = []
    for number in (1, STACK):
        with bench.workers(number, LOAD_STEP_S):
            time.sleep(3)  # what workers do at their start is over
            before = Count.now(bench.redis)
            time.sleep(IDLE_S)
            after = Count.now(bench.redis)
        per_s.append(after.since(before, after.at_s - before.at_s))
    return {name: (per_s[1][name] - per_s[0][name]) / (STACK - 1) for name in per_s[0]}


def alone(bench: Bench) -> dict[str, float]:
    """What the broker costs in a second with nobody at it: its own timer, which is part of every other row."""
    before = Count.now(bench.redis)
    time.sleep(IDLE_S)
    after = Count.now(bench.redis)
    return after.since(before, after.at_s - before.at_s)


def submission(bench: Bench) -> dict[str, float]:
    """Submit 500 jobs while a worker has announced the model; for all of them together."""
    with bench.workers(1, LOAD_STEP_S):
        pass  # the announcement stays for a while after the worker has gone
    bench.redis.zadd("latentline:workers", {"gone": bench.redis.time()[0]})  # version 0.1.0 asks for a live one
    bench.submit(1)  # the broker knows the script from here on
    before = Count.now(bench.redis)
    bench.submit(SUBMITTED)
    return Count.now(bench.redis).since(before)


def depth(bench: Bench, queued: int) -> dict[str, float]:
    """For each job, done by one fast worker in front of so many waiting ones."""
    with bench.workers(1, FAST_STEP_S):
        pass
    bench.redis.zadd("latentline:workers", {"gone": bench.redis.time()[0] + 1000})
    bench.submit(queued)
    with bench.workers(1, FAST_STEP_S):
        before, done = Count.now(bench.redis), bench.num_succeeded()
        until(lambda: bench.num_succeeded() >= done + DEPTH_JOBS, f"{DEPTH_JOBS} jobs of {queued}")
        after = Count.now(bench.redis)
        return after.since(before, bench.num_succeeded() - done)


def parts(quick: bool) -> dict[str, Callable[[Bench], dict[str, float]]]:
    """What is measured, by the name of its row."""
    depths = DEPTHS[:1] if quick else DEPTHS
    return {
        f"load of {LOAD_JOBS} jobs, for each": load,
        "the broker alone, a second": alone,
        "a further idle worker, a second": idle,
        f"submission of {SUBMITTED} jobs, for all": submission,
        **{f"{queued:,} queued, for each job done": lambda bench, queued=queued: depth(bench, queued) for queued in depths},  # type: ignore[misc]
    }


def measure(quick: bool) -> None:
    """Every part on the code that this process imports; a line of JSON for each."""
    for name, part in parts(quick).items():
        with tempfile.TemporaryDirectory(prefix="latentline-") as folder:
            bench = Bench(Path(folder))
            try:
                figures = part(bench)
            except SystemExit:
                print((Path(folder) / "workers.log").read_text(errors="replace")[-4000:], file=sys.stderr)
                raise
            finally:
                bench.close()
        print(json.dumps({"part": name, **{key: round(value, 3) for key, value in figures.items()}}), flush=True)


def run_code(root: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Measure the code of a checkout in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in (root / "worker", root / "producer", HERE))}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.broker", "--measure", *(["--quick"] if quick else [])]
    figures = {}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=HERE) as child:
        assert child.stdout is not None
        for line in child.stdout:
            row = json.loads(line)
            figures[row.pop("part")] = row
            print(f"{root.name}: {line.rstrip()}", file=sys.stderr, flush=True)
    if child.returncode:
        raise SystemExit(child.returncode)
    return figures


def table(codes: dict[str, dict[str, dict[str, float]]]) -> str:
    """All figures as Markdown."""
    names = list(next(iter(next(iter(codes.values())).values())))
    lines = ["| | code | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for part in next(iter(codes.values())):
        for code, figures in codes.items():
            lines.append(f"| {part} | {code} | " + " | ".join(f"{figures[part][name]:,.2f}" for name in names) + " |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.broker", description=__doc__)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure the code of this checkout as well")
    parser.add_argument("--quick", action="store_true", help=f"only {DEPTHS[0]:,} queued jobs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.measure:
        measure(options.quick)
        return
    codes = {"before": run_code(options.before.resolve(), options.quick)} if options.before else {}
    codes["now"] = run_code(HERE, options.quick)
    cpu = codes["now"][next(iter(parts(True)))]["broker CPU, ms"]
    figures = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "jobs_per_s_of_one_broker": round(1000 / cpu), **codes}
    print(table(codes))
    print(f"\nOne broker core carries {1000 / cpu:,.0f} jobs/s of this load, by its CPU time ({figures['machine']}).")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
