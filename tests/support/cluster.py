"""Real worker processes on a real broker and a real store, behind proxies that can fail."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from latentline import Client, records, routing
from latentline.connection import connect
from latentline.errors import LatentlineError
from latentline.jobs import JobRecord, JobRequest, ModelInfo, Status
from latentline.records import Records
from latentline.settings import Settings
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.process import Child, clean_env, free_port
from latentline_worker.embedded.store import Store

from .jobs import accepted
from .proxy import Proxy

LEASE_S = 3.0
STEP_S = 0.02  # added to each network call of these workers, so that their speed hardly depends on this machine
PATIENCE_S = 120.0
ROLE_PASSWORD = "a-role"  # of the broker's users, where a test has set them up
# The receivers of the tests listen on loopback, at any port: whoever submits and whoever delivers must allow that.
RECEIVERS = {"LATENTLINE_CALLBACK_ALLOW": "127.0.0.1", "LATENTLINE_CALLBACK_PORTS": "1-65535"}


# For tests that depend on the model: fixtures of tests/faults.
EACH_MODEL = pytest.mark.parametrize("cluster", ["tiny_model", "flow_model"], indirect=True, ids=["sd", "flow"])


@dataclass(frozen=True)
class Code:
    """The code that a process runs: a checkout, and Python that is run before it."""

    root: Path
    patch: str = ""

    @property
    def path(self) -> str:
        """For PYTHONPATH."""
        return os.pathsep.join(str(self.root / part) for part in ("worker", "producer", "tests"))

    def module(self, name: str, *args: str) -> list[str]:
        """A command that runs a module as ``python -m`` does."""
        return self._command(f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)", args)

    def script(self, path: str, *args: str) -> list[str]:
        """A command that runs a file of this checkout."""
        return self._command(f"runpy.run_path({str(self.root / path)!r}, run_name='__main__')", args)

    def _command(self, run: str, args: Sequence[str]) -> list[str]:
        return [sys.executable, "-W", "ignore", "-c", f"import runpy\n{self.patch}\n{run}", *args]


THIS_CODE = Code(Path(__file__).parents[2])


class Cluster:
    """One broker and one store; workers as a test starts them. ``client`` goes to the services directly, workers through proxies."""

    def __init__(self, folder: Path, broker: Broker, store: Store, model: Path) -> None:
        self.folder, self.broker, self.store, self.model = folder, broker, store, model
        self.redis_proxy, self.s3_proxy = Proxy(broker.port), Proxy(store.port)
        self.children: list[Child] = []
        self.redis = connect(broker.url)
        self.redis.flushall()
        self.records = Records(self.redis)
        self.client = Client(Settings.from_variables({"LATENTLINE_REDIS_URL": broker.url, **store.environment, **RECEIVERS}))
        self.accepted: list[str] = []
        self._names = itertools.count()
        self.flow = model.name == "flow"
        self.noisy = "lcm" if self.flow else "euler_ancestral"  # a scheduler of the model that draws noise at each step

    def environment(self, role: str | None = None, **extra: str) -> dict[str, str]:
        """Of a worker or service process; ``role`` is the broker's user as which it connects."""
        url = self.broker.url if role is None else f"redis://{role}:{ROLE_PASSWORD}@127.0.0.1:{self.broker.port}/0"
        return clean_env(
            **{
                "LATENTLINE_REDIS_URL": url.replace(f":{self.broker.port}/", f":{self.redis_proxy.port}/"),
                **self.store.environment,
                "LATENTLINE_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_proxy.port}",
                **({} if "LATENTLINE_MODELS" in extra else {"LATENTLINE_MODEL": str(self.model)}),
                "LATENTLINE_LEASE_S": str(LEASE_S),
                "LATENTLINE_CHECKPOINT_S": "0.2",
                "LATENTLINE_DRAIN_S": "5",
                "FAULT_STEP_S": str(STEP_S),
                "OMP_NUM_THREADS": "1",
                "LATENTLINE_AUTH": "none",
                **RECEIVERS,
                "LATENTLINE_CALLBACK_SECRET": "whsec_" + "c2VjcmV0" * 5,
                **extra,
            }
        )

    def start_worker(self, *, wait: bool = True, code: Code = THIS_CODE, role: str | None = None, **env: str) -> Child:
        """One more worker process; with ``wait`` once it takes work."""
        number = next(self._names)
        environment = self.environment(role, **env) | {"PYTHONPATH": code.path}
        child = Child(f"worker {number}", code.script("tests/support/faulty_worker.py"), self.folder / f"worker{number}.log", environment)
        self.children.append(child)
        if wait:
            self.until_ready([child])
        return child

    def until_ready(self, workers: Iterable[Child]) -> None:
        """Wait until these take work and look after what belongs to no worker."""
        for child in workers:
            child.wait_until(lambda child=child: ": ready\n" in child.log.read_text(errors="replace"), PATIENCE_S)  # type: ignore[misc]

    def workers(self) -> list[Child]:
        """Worker processes that are alive."""
        return [child for child in self.alive() if child.name.startswith("worker")]

    def start_callbacks(self, *, code: Code = THIS_CODE, role: str | None = None, **env: str) -> Child:
        """The process that delivers callbacks."""
        environment = self.environment(role, **env) | {"PYTHONPATH": code.path}
        command = code.module("latentline.cli", "callbacks", "serve")
        child = Child("callbacks", command, self.folder / f"callbacks{next(self._names)}.log", environment)
        self.children.append(child)
        child.wait_until(lambda: "ready" in child.log.read_text(errors="replace"), PATIENCE_S)
        return child

    def start_api(self, *, code: Code = THIS_CODE, role: str | None = None, **env: str) -> httpx.Client:
        """An API process; a client for it, which the test closes."""
        port = free_port()
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        environment = self.environment(role, **env) | {"PYTHONPATH": code.path}
        command = code.module("latentline.cli", "api", "--port", str(port))
        child = Child("api", command, self.folder / f"api{next(self._names)}.log", environment)
        self.children.append(child)

        def answers() -> bool:
            try:
                return http.get("/healthz").status_code == 200
            except httpx.HTTPError:
                return False

        child.wait_until(answers, PATIENCE_S)
        return http

    def offer(self) -> None:
        """Announce the model, so that jobs may be submitted while no worker is up."""
        served = ModelInfo(id=self.model.name, family="sd", default_width=64, default_height=64, max_pixels=128 * 128)
        self.records.announce("not up yet", [served])

    def submit(self, count: int = 1, **fields: Any) -> list[str]:
        """Accepted job ids; prompts and seeds differ."""
        base = {"prompt": "a cat", "num_inference_steps": 40, "scheduler": self.noisy, "model": self.model.name} | fields
        requests = [JobRequest.parse(base | {"seed": len(self.accepted) + i}) for i in range(count)]
        self.offer()
        ids = [record.id for record in accepted(self.client.submit_many(requests))]
        self.accepted += ids
        return ids

    def until(self, true: Callable[[], Any], timeout_s: float = PATIENCE_S, every_s: float = 0.02) -> Any:
        """The first true value of ``true()``; fails with the ends of all logs when time runs out."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                value = true()
            except LatentlineError:
                value = None
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s\n" + "\n\n".join(child.tail() for child in self.children))
            time.sleep(every_s)

    def get(self, job_id: str) -> JobRecord:
        return self.client.get(job_id)

    def running(self, step: int = 1) -> list[JobRecord]:
        """Jobs in flight that have done at least so many steps."""
        return [record for record in self.client.list(Status.RUNNING, limit=200)[0] if record.step >= step]

    def finish(self, ids: Iterable[str] | None = None, timeout_s: float = PATIENCE_S) -> list[JobRecord]:
        """Wait until these jobs (or all) have ended."""
        wanted = list(self.accepted if ids is None else ids)
        left = set(wanted)

        def ended() -> bool:
            left.difference_update([job_id for job_id in list(left)[:200] if self.get(job_id).status.terminal])
            return not left

        self.until(ended, timeout_s, 0.1)
        return [self.get(job_id) for job_id in wanted]

    def check_invariants(self, statuses: Sequence[Status] = (Status.SUCCEEDED,)) -> dict[str, int]:
        """Nothing lost, nothing done twice, every image stored and intact, one callback id per end; how many jobs ended how."""
        counts: Counter[str] = Counter()
        s3 = self.client.images
        callback_ids = [cid for cid in self.redis.zrange(routing.callbacks_key(), 0, -1) if not cid.split("_")[2].startswith("running")]
        told = Counter(cid.split("_")[1] for cid in callback_ids)
        for job_id in self.accepted:
            record = self.get(job_id)
            assert record.status.terminal, f"{job_id} has not ended: {record}"
            assert record.status in statuses, f"{job_id}: {record.status} {record.error}"
            counts[record.status.value] += 1
            kinds = [event.type for event in records.run(self.redis, records.events(job_id)) if event.terminal]
            assert len(kinds) == 1, f"{job_id} ended {len(kinds)} times"
            assert told[job_id] == (record.request.callback is not None), f"{job_id}: {told[job_id]} callbacks of its end"
            for image in record.images:
                assert hashlib.sha256(s3.download(image.key)).hexdigest() == image.sha256
        assert sum(counts.values()) == len(set(self.accepted)) == len(self.accepted)
        return dict(counts)

    def kill(self, child: Child, number: int = signal.SIGKILL) -> None:
        os.kill(child.process.pid, number)

    def alive(self) -> list[Child]:
        return [child for child in self.children if child.alive]

    def close(self) -> None:
        for child in self.children:
            if child.alive:
                os.kill(child.process.pid, signal.SIGCONT)
                child.process.kill()
                child.process.wait()
            child.stop()
        self.redis_proxy.close()
        self.s3_proxy.close()
        self.client.close()
        self.redis.close()
