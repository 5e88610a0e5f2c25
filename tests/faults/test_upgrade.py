"""A fleet is upgraded process by process: version 0.1.0 beside this one, workers and APIs in either order, with kills."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
from support.cluster import ROLE_PASSWORD, THIS_CODE, Cluster, Code
from support.collector import Collector
from support.receiver import Receiver

from latentline import routing
from latentline.jobs import Status
from latentline_worker.embedded.process import Child

Figure = Callable[..., None]

OLD_COMMIT = "24a4813"  # the last one before stored requests became tolerant
ROLES = ("producer", "worker", "callbacks")
USERS = "deploy/valkey/users.acl"
# A coming version, of which no code exists yet: it has a field that no worker of today knows.
NEXT_CODE = Code(THIS_CODE.root, "import latentline.jobs; latentline.models.LEVEL = 4; latentline.models.ADDED['preview_every'] = 4")


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    """The code before this change, from the repository's own history."""
    git = ["git", "-C", str(THIS_CODE.root)]
    archive = subprocess.run([*git, "archive", OLD_COMMIT, "producer", "worker", "tests/support", USERS], capture_output=True)
    if archive.returncode:
        reason = f"commit {OLD_COMMIT} is not in this checkout's history: {archive.stderr.decode(errors='replace').strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    code = Code(folder)
    found = subprocess.run(
        [sys.executable, "-c", "import latentline, latentline_worker; print(latentline.__file__, latentline_worker.__file__)"],
        env={**os.environ, "PYTHONPATH": code.path}, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.split()  # fmt: skip
    assert len(found) == 2 and all(path.startswith(str(folder)) for path in found), found
    return code


class Fleet:
    """Old and new processes on one broker, each under its role's user, and jobs that are submitted through every API."""

    def __init__(self, cluster: Cluster, receiver: Receiver, steps: int) -> None:
        self.cluster, self.receiver, self.steps = cluster, receiver, steps
        self.apis: dict[str, httpx.Client] = {}
        self._open = ExitStack()
        self._numbers = itertools.count()

    def allow(self, code: Code) -> None:
        """Set the users' rules to those that this code ships, on the running broker."""
        digest = hashlib.sha256(ROLE_PASSWORD.encode()).hexdigest()
        for line in (code.root / USERS).read_text().splitlines():
            words = line.split()
            if words[:1] == ["user"] and words[1] in ROLES:
                rules = [word.replace(f"@{words[1]}@", digest) for word in words[2:]]
                self.cluster.redis.execute_command("ACL", "SETUSER", words[1], "reset", *rules)

    def start_api(self, name: str, code: Code) -> None:
        self.apis[name] = self._open.enter_context(closing(self.cluster.start_api(code=code, role="producer")))

    def start_worker(self, code: Code, *, wait: bool = True) -> Child:
        return self.cluster.start_worker(wait=wait, code=code, role="worker")

    def body(self, **fields: Any) -> dict[str, Any]:
        number = next(self._numbers)
        names = {"model": self.cluster.model.name, "prompt": "a cat", "seed": number, "num_inference_steps": self.steps}
        return names | {"callback": {"url": self.receiver.url}, "idempotency_key": f"key-{number}"} | fields

    def submit(self, count: int) -> None:
        """So many jobs through each API, every one sent again through every other API under the same key."""
        for _ in range(count):
            for http in self.apis.values():
                body = self.body(num_images=1 + count % 2)
                answers = [first.post("/v1/jobs", json=body) for first in (http, *self.apis.values())]
                assert [answer.status_code for answer in answers] == [202] * len(answers), [answer.text for answer in answers]
                (job_id,) = {answer.json()["id"] for answer in answers}
                self.cluster.accepted.append(job_id)

    def look(self) -> None:
        """Every API reads every job and lists them all."""
        for name, http in self.apis.items():
            page = http.get("/v1/jobs", params={"limit": 200})
            assert page.status_code == 200, f"{name}: {page.text}"
            assert {job["id"] for job in page.json()["jobs"]} >= set(self.cluster.accepted[-50:]), name
            for job_id in self.cluster.accepted[-3:]:
                assert http.get(f"/v1/jobs/{job_id}").status_code == 200, name

    def kill_while_it_works(self, worker: Child) -> None:
        """kill -9 while this worker has jobs that it has denoised for a while."""
        mine = f":{worker.process.pid}"
        self.cluster.until(lambda: [job for job in self.cluster.running(step=5) if str(job.worker).endswith(mine)])
        self.cluster.kill(worker)

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def fleet(cluster: Cluster, receiver: Receiver, full: bool) -> Iterator[Fleet]:
    running = Fleet(cluster, receiver, steps=100 if full else 24)
    yield running
    running.close()
    cluster.redis.execute_command("ACL", "DELUSER", *ROLES)


@pytest.mark.parametrize("first", ["API first", "workers first"])
def test_upgrading_one_process_at_a_time(
    fleet: Fleet, collector: Collector, old_code: Code, full: bool, figure: Figure, first: str
) -> None:
    cluster, count, kills = fleet.cluster, 6 if full else 1, 4 if full else 1
    fleet.allow(old_code)
    worker = fleet.start_worker(old_code, wait=False)  # loads its model meanwhile
    cluster.start_callbacks(code=old_code, role="callbacks")
    fleet.start_api("old", old_code)
    cluster.until_ready([worker])
    fleet.submit(count)
    fleet.allow(THIS_CODE)
    fleet.submit(count)  # old processes under the new rules

    if first == "API first":
        fleet.start_api("new", THIS_CODE)
        assert [model["id"] for model in fleet.apis["new"].get("/v1/models").json()["models"]] == [cluster.model.name]
        new_worker = fleet.start_worker(THIS_CODE, wait=False)
        fleet.submit(count)
        fleet.look()
        cluster.until_ready([new_worker])
    else:
        new_worker = fleet.start_worker(THIS_CODE)
        fleet.submit(count)
        fleet.start_api("new", THIS_CODE)
    fleet.submit(count)
    fleet.look()

    for kill in range(kills):  # old and new workers in turn take over what the other had; the last that is killed is an old one
        while len(cluster.client.list(Status.QUEUED, limit=200)[0]) < 4:
            fleet.submit(1)
        code, victim = (old_code, worker) if (kills - kill) % 2 else (THIS_CODE, new_worker)
        fleet.kill_while_it_works(victim)
        if kill < kills - 1:
            worker, new_worker = (fleet.start_worker(code), new_worker) if code is old_code else (worker, fleet.start_worker(code))
    fleet.look()
    done = cluster.finish(timeout_s=600)
    cluster.until(lambda: len(fleet.receiver.answered) == len(cluster.accepted))
    ended = cluster.check_invariants()
    served_by = {str(record.worker) for record in done}
    assert len(served_by) > 1, "only one version has run jobs: the test shows nothing"
    # What the old worker lost is told by the new one, in traces that the old processes have left alone.
    cluster.until(lambda: any(span.attributes.get("latentline.outcome") == "lost" for span in collector.spans))
    figure(
        f"an upgrade one process at a time, {first}",
        jobs=len(cluster.accepted),
        ended=ended,
        callbacks_told_once=len(fleet.receiver.answered),
        kills=kills,
        attempts=sum(record.attempt for record in done),
    )


def test_a_job_for_newer_workers_waits_for_one(fleet: Fleet, old_code: Code, figure: Figure) -> None:
    """A job that asks for what a coming level has: refused while no worker has the level, then never taken by one of before."""
    cluster = fleet.cluster
    fleet.allow(THIS_CODE)
    fleet.start_api("next", NEXT_CODE)
    fleet.start_worker(old_code)
    fleet.start_worker(THIS_CODE)
    asking = {"preview_every": 2}
    refused = fleet.apis["next"].post("/v1/jobs", json=fleet.body(**asking))
    assert (refused.status_code, refused.json()["error"]["field"]) == (422, "preview_every"), refused.text
    next_worker = fleet.start_worker(NEXT_CODE)
    answers = [fleet.apis["next"].post("/v1/jobs", json=fleet.body(**(asking if i % 2 else {}))) for i in range(12)]
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
    cluster.accepted += [answer.json()["id"] for answer in answers]
    fleet.kill_while_it_works(next_worker)
    higher = [answer.json()["id"] for answer in answers[1::2]]
    # The older workers end everything else. What is left waits in the queues of level 4.
    cluster.finish([answer.json()["id"] for answer in answers[::2]])
    cluster.until(lambda: {cluster.get(job_id).status for job_id in higher} <= {Status.QUEUED, Status.SUCCEEDED})
    waiting = [job_id for job_id in higher if cluster.get(job_id).status is Status.QUEUED]
    assert waiting, "every job of level 4 had ended before the worker was killed: the test shows nothing"
    assert {cluster.redis.hget(routing.job_key(job_id), "level") for job_id in higher} == {"4"}
    last = fleet.start_worker(NEXT_CODE)
    done = {record.id: record for record in cluster.finish()}
    ended = cluster.check_invariants()
    pids = tuple(f":{worker.process.pid}" for worker in (next_worker, last))
    assert all(str(done[job_id].worker).endswith(pids) for job_id in higher)
    figure("a job for newer workers only", jobs=len(done), ended=ended, waited_for_one=len(waiting))
