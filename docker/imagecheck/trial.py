"""The images at work: what an operator relies on, seen once on this machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from .deploy import PORT, Deploy
from .engine import Container, Engine, RunSpec
from .errors import CheckError
from .services import Services

NAMES = ("api", "worker", "callbacks")
URL = f"http://127.0.0.1:{PORT}"
NUM_JOBS = 20
NUM_LONG_JOBS = 6  # in flight when the worker is stopped
LONG = {"num_inference_steps": 100, "num_images": 2}
SCHEDULERS = ("dpmpp_2m", "euler_ancestral", "unipc", "lms")  # the last one needs scipy, which only a dependency brings
PATIENCE_S = 600.0  # twice what the manifests give a worker to load its model: other work may run on this machine
POLL_S = 0.1
EXIT_STATUSES = (0, 143)  # 143: ended by SIGTERM itself, as uvicorn does once it has closed everything

# On top of what deploy/ sets. The receiver listens on loopback, where callbacks must not go unless this says so. Several
# threads of one forward wait for each other at every operator, and for minutes where other work takes a core from one of them.
RECEIVER = {"LATENTLINE_CALLBACK_ALLOW": "127.0.0.1", "LATENTLINE_CALLBACK_PORTS": "1-65535"}
EXTRA = {"api": RECEIVER, "callbacks": RECEIVER, "worker": {"OMP_NUM_THREADS": "1"}}

# Printed by a process inside: who it is, what it may do, and what the image holds.
LOOK = """
import glob, importlib.metadata as m, json, os, shutil, sysconfig
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
site = sysconfig.get_path("purelib")
print(json.dumps({
    "user": status["Uid"].split(), "capabilities": int(status["CapEff"], 16), "no_new_privileges": int(status["NoNewPrivs"]),
    "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "compilers": [name for name in ("cc", "gcc", "g++", "clang", "nvcc") if shutil.which(name)],
    "caches": [path for path in ("/root/.cache", os.path.expanduser("~/.cache/pip")) if os.path.exists(path)],
    "tests": glob.glob(site + "/**/tests", recursive=True) + glob.glob(site + "/torch/test"),
    "torch": [d.version for d in m.distributions() if d.metadata["Name"] == "torch"],
}))
"""


def problems(seen: Mapping[str, Any], spec: RunSpec, user: str) -> list[str]:
    """What of :data:`LOOK`'s answer is not as the image and ``deploy/`` say."""
    number = user.partition(":")[0]
    rules = {
        "it runs as root": "0" in seen["user"],
        f"it runs as {seen['user'][0]} and the image says {number}": set(seen["user"]) != {number},
        "it has capabilities": spec.drop_capabilities and seen["capabilities"] != 0,
        "it may gain privileges": spec.no_new_privileges and not seen["no_new_privileges"],
        "its root can be written": spec.read_only and not seen["read_only"],
        f"it holds compilers: {seen['compilers']}": seen["compilers"],
        f"it holds pip's cache: {seen['caches']}": seen["caches"],
        f"it holds tests of packages: {seen['tests'][:3]}": seen["tests"] and seen["torch"],  # a few in the API's do not matter
        f"it holds torch more than once: {seen['torch']}": len(seen["torch"]) > 1,
    }
    return [text for text, broken in rules.items() if broken]


@dataclass
class Trial:
    """Starts the three services of the compose file and puts them through a day's events; ``figures`` is what was seen."""

    engine: Engine
    deploy: Deploy
    services: Services
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self._running: dict[str, Container] = {}
        self._started: dict[str, float] = {}
        self._http = httpx.Client(base_url=URL, timeout=30, trust_env=False)

    def run(self) -> None:
        try:
            self._http.headers["Authorization"] = f"Bearer {self.services.broker.new_key()}"
            for name in NAMES:
                self.start(name)
            for name in NAMES:
                self.wait_healthy(name)
                self.look_inside(name)
            self.twenty_jobs()
            self.stop_in_flight()
            self.rules_in_force()
            for name in NAMES:
                self.stop(name)
        except Exception as error:
            logs = "\n".join(f"--- {name}\n{container.log()[-3000:]}" for name, container in self._running.items())
            raise CheckError(f"{error}\n{logs}") from error
        finally:
            self._http.close()

    def start(self, name: str) -> None:
        self._started[name] = time.monotonic()
        self._running[name] = self.engine.start(self.deploy.spec(name, **EXTRA.get(name, {})))

    def until(self, what: str, true: Callable[[], Any]) -> Any:
        """The first true value; raises when time runs out or a container has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for container in self._running.values():
                if not container.alive():
                    raise CheckError(f"{container.name} ended by itself")
            try:
                if value := true():
                    return value
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise CheckError(f"{what}: not within {PATIENCE_S:g} s")
            time.sleep(POLL_S)

    def wait_healthy(self, name: str) -> None:
        """By the image's own health check, and by every probe of the manifest."""
        container, spec, probes = self._running[name], self.deploy.spec(name), self.deploy.probes(name)
        health = self.engine.config(spec.image).health
        if not health:
            raise CheckError(f"{spec.image} has lost its health check")

        def healthy() -> bool:
            return all(container.execute(command).returncode == 0 for command in {health, *probes.commands})

        def serves() -> bool:
            return all(self._http.get(path).status_code == 200 for path in set(probes.paths))

        self.until(f"the health checks of {name}", lambda: healthy() and serves())
        took_s = time.monotonic() - self._started[name]
        self.figures.setdefault(f"start_{name}_s", round(took_s, 1))
        self.say(f"{name} is healthy {took_s:.1f} s after its start")

    def look_inside(self, name: str) -> None:
        result = self._running[name].execute(["python", "-c", LOOK])
        if result.returncode:
            raise CheckError(f"looking inside of {name} failed: {result.stderr.strip()}")
        spec = self.deploy.spec(name)
        seen = json.loads(result.stdout)
        self.figures |= {"torch": seen["torch"]} if seen["torch"] else {}
        wrong = problems(seen, spec, self.engine.config(spec.image).user)
        if wrong:
            raise CheckError(f"{name}: {'; '.join(wrong)}")

    # Jobs.

    def submit(self, count: int, **fields: Any) -> list[str]:
        assert self.services.receiver is not None  # Services.start made it
        ids = []
        for number in range(count):
            body = {"prompt": "a red apple", "seed": number, "callback": {"url": self.services.receiver.url}}
            answer = self._http.post("/v1/jobs", json=body | {"scheduler": SCHEDULERS[number % len(SCHEDULERS)]} | fields)
            if answer.status_code != 202:
                raise CheckError(f"a job was answered with {answer.status_code}: {answer.text}")
            ids.append(answer.json()["id"])
        return ids

    def jobs(self, ids: list[str]) -> list[dict[str, Any]]:
        return [self._http.get(f"/v1/jobs/{job_id}").raise_for_status().json() for job_id in ids]

    def finish(self, ids: list[str]) -> None:
        """Wait for every job; each has to have its pictures, whole."""
        self.until("the end of the jobs", lambda: all(job["status"] not in ("queued", "running") for job in self.jobs(ids)))
        for job in self.jobs(ids):
            if job["status"] != "succeeded":
                raise CheckError(f"job {job['id']} ended as {job['status']}: {job.get('error')}")
            for image in job["images"]:
                # Not through the client of the API: the links go to the store and carry their own rights.
                data = httpx.get(image["url"], timeout=30, trust_env=False).raise_for_status().content
                if hashlib.sha256(data).hexdigest() != image["sha256"]:
                    raise CheckError(f"{image['key']} is not what the record says")

    def told(self, ids: list[str]) -> None:
        """Wait until each job's end was told, under one message id for each."""
        receiver = self.services.receiver
        assert receiver is not None

        def ends() -> Counter[str]:
            bodies = [copies[0] for copies in list(receiver.received.values())]
            return Counter(body["data"]["id"] for body in bodies if body["type"] == "job.succeeded")

        self.until("the callbacks", lambda: set(ids) <= set(ends()))
        if doubled := [job_id for job_id in ids if ends()[job_id] != 1]:
            raise CheckError(f"the end of {doubled[0]} was told under {ends()[doubled[0]]} ids")
        if receiver.unsigned:
            raise CheckError(f"{receiver.unsigned} callbacks were not signed with the secret")

    def twenty_jobs(self) -> None:
        started = time.monotonic()
        ids = self.submit(NUM_JOBS)
        self.finish(ids)
        self.told(ids)
        self.figures["jobs_s"] = round(time.monotonic() - started, 1)
        self.say(f"{NUM_JOBS} jobs succeeded and their callbacks came, in {self.figures['jobs_s']} s")
        expected = {"producer", "worker", "callbacks"}
        if not expected <= (connected := self.services.broker.connected()):
            raise CheckError(f"the broker is used by {sorted(connected)} and not by each role")

    # Ends.

    def stop(self, name: str) -> None:
        """As on an update: the stop signal, and the time that deploy/ gives."""
        grace_s = self.deploy.grace_s(name)
        container = self._running.pop(name)
        ended = container.stop(grace_s)
        if ended.killed:
            raise CheckError(f"{name} had not ended {grace_s:g} s after its stop signal:\n{container.log()[-3000:]}")
        if ended.status not in EXIT_STATUSES:
            raise CheckError(f"{name} ended with status {ended.status} after its stop signal:\n{container.log()[-3000:]}")
        self.figures[f"stop_{name}_s"] = round(ended.took_s, 1)
        self.say(f"{name} ended with status {ended.status} in {ended.took_s:.1f} s of the {grace_s:g} s that it has")

    def stop_in_flight(self) -> None:
        """The worker is told to stop while jobs denoise; then everything stops, the broker restarts, everything starts again."""
        ids = self.submit(NUM_LONG_JOBS, **LONG)
        self.until("a job in flight", lambda: any(job["status"] == "running" and job["step"] > 0 for job in self.jobs(ids)))
        self.stop("worker")
        self.figures["drain_s"] = self.figures["stop_worker_s"]
        left = [job for job in self.jobs(ids) if job["status"] == "queued"]
        if not left or any(job["status"] == "running" for job in self.jobs(ids)):
            raise CheckError(f"the worker did not hand its jobs back: {[job['status'] for job in self.jobs(ids)]}")
        self.figures["handed_back"] = len(left)
        self.say(f"{len(left)} of {len(ids)} jobs were handed back")
        self.stop("api")
        self.stop("callbacks")
        # The broker writes its log of refusals nowhere: read it before it goes.
        self.check_refusals()
        self.services.broker.restart()
        # The deliverer comes last: it has to find what ended without it.
        for name in ("worker", "api"):
            self.start(name)
        self.wait_healthy("worker")
        self.wait_healthy("api")
        self.finish(ids)
        self.start("callbacks")
        self.wait_healthy("callbacks")
        self.told(ids)
        self.say("all of them succeeded after a restart of everything, and were told once")

    def check_refusals(self) -> None:
        if refused := self.services.broker.refused():
            raise CheckError(f"the broker's rules refused what a role needs: {'; '.join(refused)}")

    def rules_in_force(self) -> None:
        self.check_refusals()
        self.services.broker.check_rules()
        self.say("the broker's rules refused nothing that was needed, and what they should")
