"""What jobs and workers cost the broker: calls, commands and bytes, as a real broker counts them. No test here measures time."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import redis
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio.connection import AbstractConnection
from support.collector import TRACEPARENT
from support.jobs import PATIENCE_S, accepted

from latentline import Settings, records, routing
from latentline.api.app import create_app
from latentline.api.estimates import Estimates
from latentline.connection import MAX_CONNECTIONS
from latentline.jobs import Claim, ImageRef, JobRequest, Phase, Status, resolve
from latentline.keys import NewKey
from latentline.models import Working
from latentline.provenance import Made
from latentline.records import Records
from latentline.testing import MODEL, FakeImages
from latentline.timeline import Account, Run
from latentline.tracing.export import Traces
from latentline_worker.embedded.process import clean_env
from latentline_worker.generate.leased_job import LeasedJob
from latentline_worker.generate.leases import INTERVAL_S, Leases
from latentline_worker.generate.spans import AttemptSpans

ROOT = Path(__file__).parents[2]
PROMPT = "a red apple left of a green cup on a wooden table, soft light, in the style of an old children's book"
IMAGE = ImageRef(
    key="default/job/1/0.png",
    seed=1,
    width=64,
    height=64,
    content_type="image/png",
    sha256="0" * 64,
    num_bytes=4096,
    pixels_sha256="1" * 64,
)
# Of a job of 20 steps that two other jobs joined and left.
MADE = Made(
    weights="a" * 64,
    dtype="float32",
    sampler="b" * 64,
    prompt_tokens=25,
    prompt_tokens_read=25,
    versions={"latentline": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1", "pillow": "12.0.0"},
    device="cpu",
)
ACCOUNT = Account(
    spans={"encoding": (2, 25), "waiting": (27, 0), "denoising": (27, 1500), "decoding": (1527, 40), "uploading": (1570, 12)},
    runs=(Run(1, 1, 2, 27, (71.35,) * 5), Run(6, 3, 6, 400, (98.17,) * 10), Run(16, 1, 2, 1390, (71.35,) * 5)),
    num_checkpoints=1,
    checkpoints=((14, 1200),),
    beside=("12345678-1234-1234-1234-123456789012",) * 2,
    made=MADE,
).to_json()
# What the clients of earlier tests may still say when they go, and the look at the counters itself.
CONNECTION_COMMANDS = {"info", "ping", "hello", "client|setinfo", "client|setname", "unsubscribe", "unwatch", "discard"}
WATCHED_S = 6.0  # idle workers send heartbeats every three seconds


class Counted:
    """What the broker did between two looks at its counters, without the looks themselves."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._before = self._read()

    def _read(self) -> dict[str, int]:
        calls = cast(dict[str, Any], self._client.info("commandstats"))
        counts = {name.removeprefix("cmdstat_"): int(row["calls"]) for name, row in calls.items()}
        for name in CONNECTION_COMMANDS & set(counts):
            del counts[name]
        scripts = counts.get("evalsha", 0) + counts.get("eval", 0)
        received = int(cast(dict[str, Any], self._client.info("stats"))["total_net_input_bytes"])
        return {"scripts": scripts, "commands": sum(counts.values()) - scripts, "bytes": received} | counts

    def since(self) -> dict[str, int]:
        """Script calls, commands (those inside of scripts among them), bytes received; and the calls of each command that had any."""
        now = self._read()
        spent = {name: now[name] - self._before.get(name, 0) for name in now}
        return {name: n for name, n in spent.items() if n or name in ("scripts", "commands", "bytes")}


class Request:
    """A request in the engine, as the leases thread sees it."""

    def __init__(self) -> None:
        self.step, self.num_steps, self.batch_jobs = 0, 20, 1
        self.phase, self.preview, self.checkpoint = Phase.DENOISING, None, None

    def cancel(self, reason: str) -> None: ...


@pytest.fixture
def store(empty_valkey: redis.Redis) -> Records:
    return Records(empty_valkey, 600)


def submit(client: redis.Redis, count: int = 1, traceparent: str = "") -> list[str]:
    requests = [JobRequest.parse({"prompt": PROMPT, "num_inference_steps": 20, "seed": i}) for i in range(count)]
    submissions = [replace(resolve(one), traceparent=traceparent) for one in requests]
    return [record.id for record in accepted(records.run(client, records.submit(submissions, 600)))]


def live(client: redis.Redis, store: Records, traceparent: str = "") -> None:
    """All transitions of one job, with the beats that a job of some seconds needs."""
    now = [0.0]
    leases = Leases(store, 30, clock=lambda: now[0])
    (job_id,) = submit(client, traceparent=traceparent)
    assert not store.suspect(job_id)
    claim = store.claim(job_id, "one", 30)
    assert claim is not None
    spans = AttemptSpans(Traces("latentline-test", "one", InMemorySpanExporter()).tracer if traceparent else None, store)
    with leases.hold(claim) as job:
        request = Request()
        job.attach(cast(Any, request))
        for step in (1, 20):
            request.step, now[0] = step, now[0] + 1
            leases.beat()
    with spans.ending(job) as ending:
        account = Account.model_validate_json(ACCOUNT).model_copy(update={"span": traceparent}).to_json()
        store.settle(job_id, claim.token, Status.SUCCEEDED, images=[IMAGE], timings={"denoising_s": 1.5}, account=account)
        ending.outcome = "succeeded"


@pytest.mark.parametrize("traceparent", ["", TRACEPARENT], ids=["untraced", "traced"])
def test_all_transitions_of_a_job_fit_a_budget(empty_valkey: redis.Redis, store: Records, traceparent: str) -> None:
    live(empty_valkey, store, traceparent)  # the broker knows the scripts from here on
    counted = Counted(empty_valkey)
    live(empty_valkey, store, traceparent)
    spent = counted.since()
    assert spent["scripts"] <= 5
    assert spent["commands"] <= 80, spent
    assert spent["bytes"] <= 4_000, spent


@pytest.fixture
def jobs(empty_valkey: redis.Redis, store: Records) -> Iterator[tuple[Leases, list[LeasedJob], list[float]]]:
    """Sixteen jobs in flight that have reported, and the clock of their leases."""
    now = [0.0]
    leases = Leases(store, 30, clock=lambda: now[0])
    claims = [store.claim(job_id, "one", 30) for job_id in submit(empty_valkey, 16)]
    with ExitStack() as stack:
        held = [stack.enter_context(leases.hold(cast(Claim, claim))) for claim in claims]
        for job in held:
            job.attach(cast(Any, Request()))
        leases.beat()
        yield leases, held, now


@pytest.mark.parametrize("changed", [0, 1, 5, 16])
def test_a_beat_is_one_call_that_costs_what_has_changed(
    empty_valkey: redis.Redis, jobs: tuple[Leases, list[LeasedJob], list[float]], changed: int
) -> None:
    leases, held, now = jobs
    for job in held[:changed]:
        assert job.request is not None
        job.request.step += 1
    now[0] += 1 + INTERVAL_S  # sixteen jobs report steps once a second
    counted = Counted(empty_valkey)
    leases.beat()
    spent = counted.since()
    assert spent["scripts"] == min(changed, 1)
    assert spent["commands"] <= 5 * changed
    assert spent["bytes"] <= 400 + 250 * changed


def test_a_beat_that_renews_every_lease_costs_at_most_six_commands_a_job(
    empty_valkey: redis.Redis, jobs: tuple[Leases, list[LeasedJob], list[float]]
) -> None:
    leases, held, now = jobs
    for job in held:
        assert job.request is not None
        job.request.step += 1
    now[0] += 10
    counted = Counted(empty_valkey)
    leases.beat()
    spent = counted.since()
    assert spent["scripts"] == 1 and spent["commands"] <= 2 + 4 * len(held)


def test_five_hundred_jobs_are_submitted_in_600_kb(empty_valkey: redis.Redis) -> None:
    submit(empty_valkey)
    counted = Counted(empty_valkey)
    submit(empty_valkey, 500)
    spent = counted.since()
    assert spent["scripts"] == 500 and spent["bytes"] <= 600_000


def test_places_in_the_queue_cost_one_call_and_a_command_for_each_job(empty_valkey: redis.Redis) -> None:
    waiting = dict.fromkeys(submit(empty_valkey, 60), MODEL.id)
    records.run(empty_valkey, records.positions(waiting))
    counted = Counted(empty_valkey)
    assert list(records.run(empty_valkey, records.positions(waiting)).values()) == list(range(60))
    spent = counted.since()
    assert (spent["scripts"], spent["commands"]) == (1, 60) and spent["bytes"] <= 60 * 70, spent


@contextmanager
def workers(client: redis.Redis, url: str, number: int, log: Path, **env: str) -> Iterator[None]:
    """So many real worker processes whose device is a clock, once all have announced themselves."""
    broker: Any = importlib.import_module("benchmarks.broker")
    path = os.pathsep.join(str(ROOT / part) for part in ("worker", "producer"))
    with broker.sleeping_workers(number, clean_env(PYTHONPATH=path, **broker.without_store(url), **env), log):
        for _ in range(40 * PATIENCE_S):  # each imports torch, on cores that may be busy
            if client.zcard(routing.workers_key()) == number:
                break
            time.sleep(0.1)
        else:
            pytest.fail(log.read_text(errors="replace")[-2000:])
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("models", "warm", "commands"), [(1, 1, 5), (10, 3, 9), (10, 10, 9)])
def test_a_further_idle_worker_costs_few_commands_and_a_kilobyte_a_second(
    empty_valkey: redis.Redis, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: int, warm: int, commands: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    spent = []
    for number in (1, 3):
        env = {"NUM_MODELS": str(models), "NUM_WARM": str(warm)}
        with workers(empty_valkey, valkey_url, number, tmp_path / "workers.log", **env):
            time.sleep(2)  # the first announcement, turn and heartbeat of each are over
            began = empty_valkey.time()
            counted = Counted(empty_valkey)
            time.sleep(WATCHED_S)
            one, ended = counted.since(), empty_valkey.time()
        seconds = ended[0] - began[0] + (ended[1] - began[1]) / 1e6
        spent.append({name: one[name] / seconds for name in ("commands", "bytes")})
    further = {name: (spent[1][name] - spent[0][name]) / 2 for name in spent[0]}
    print(f"{models} models, {warm} of them in memory: {further} a second")
    assert further["commands"] <= commands
    assert further["bytes"] <= 1000


def test_a_heartbeat_asks_of_ten_models_what_waits_in_one_call_of_900_bytes(empty_valkey: redis.Redis, store: Records) -> None:
    names = [MODEL.id, *(f"owner/a-model-with-a-long-name-{i}" for i in range(9))]
    store.announce("one", [MODEL.model_copy(update={"id": name}) for name in names])
    working = Working(device="cuda (one of many)", capacity=16, warm=tuple(names[:3]))
    assert store.heartbeat("one", working, names) == {}
    counted = Counted(empty_valkey)
    store.heartbeat("one", working, names)
    idle = counted.since()
    assert idle["scripts"] == 1 and idle["commands"] <= 6 + len(names) and idle["bytes"] <= 900
    submit(empty_valkey, 200)
    counted = Counted(empty_valkey)
    (waited,) = cast(dict[str, float], store.heartbeat("one", working, names)).values()
    assert waited > 0
    assert counted.since()["commands"] <= idle["commands"] + 13, "the cost does not grow with the queue"


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of commands in each batch that an asyncio client sends to the broker."""
    sent: list[int] = []
    send = AbstractConnection.send_packed_command

    async def counted(self: AbstractConnection, command: Any, check_health: bool = True) -> None:
        text = command if isinstance(command, bytes) else b"".join([command] if isinstance(command, str) else command)
        sent.append(text.count(b"*"))
        await send(self, command, check_health)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    return sent


def test_connections_to_the_broker_do_not_grow_with_listeners_and_polls(
    empty_valkey: redis.Redis, store: Records, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentline.operations.Images", lambda settings: FakeImages())
    text, _ = records.run(empty_valkey, records.create_key(NewKey.parse(tenant="default")))
    ids = submit(empty_valkey, 20)

    def num_connections() -> int:
        return int(cast(dict[str, Any], empty_valkey.info("clients"))["connected_clients"])

    before = num_connections()

    async def crowd() -> list[int]:
        app = create_app(Settings.from_variables({"LATENTLINE_REDIS_URL": valkey_url, "LATENTLINE_AUTH": "keys"}))
        headers = {"Authorization": f"Bearer {text}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", headers=headers) as http,
        ):
            # A stream of jobs that wait has no end, and this transport gives an answer once it is complete.
            streams: list[asyncio.Task[httpx.Response]] = []
            for _ in range(5):
                streams += [asyncio.create_task(http.get("/v1/events", params={"jobs": ",".join(ids[i % 10 :])})) for i in range(40)]
                while sum(len(entry.streams) for entry in app.state.streams._open.values()) < len(streams):
                    assert not any(one.done() for one in streams)
                    await asyncio.sleep(0.01)
            polls = [await asyncio.gather(*(http.get(f"/v1/jobs/{ids[i]}") for i in range(20))) for _ in range(5)]
            found = [num_connections() - before, *{answer.status_code for group in polls for answer in group}]
            await asyncio.to_thread(lambda: [records.run(empty_valkey, records.cancel(job_id, 600)) for job_id in ids])
            ended = await asyncio.wait_for(asyncio.gather(*streams), PATIENCE_S)
            assert all(answer.text.count("event: job.cancelled") == 20 - i % 10 for i, answer in enumerate(ended))
            return found

    connections, *statuses = asyncio.run(crowd())
    assert connections <= MAX_CONNECTIONS and statuses == [200]


def test_what_requests_with_keys_cost_in_round_trips(
    empty_valkey: redis.Redis, store: Records, valkey_url: str, monkeypatch: pytest.MonkeyPatch, round_trips: list[int]
) -> None:
    monkeypatch.setattr("latentline.operations.Images", lambda settings: FakeImages())
    monkeypatch.setattr(Estimates, "life_s", 600)  # what workers tell is read every few seconds, by no request
    store.announce("one", [MODEL])
    text, _ = records.run(empty_valkey, records.create_key(NewKey.parse(tenant="default", limits={"rate": 100})))

    async def count() -> dict[str, int]:
        app = create_app(Settings.from_variables({"LATENTLINE_REDIS_URL": valkey_url, "LATENTLINE_AUTH": "keys"}))
        headers = {"Authorization": f"Bearer {text}"}
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers) as http:
            await app.state.estimates.look()

            async def trips(method: str, path: str, **options: Any) -> int:
                for _ in range(2):  # the connection is set up and the scripts are known from the first one on
                    round_trips.clear()
                    (await http.request(method, path, **options)).raise_for_status()
                return len(round_trips)

            body = {"prompt": PROMPT, "deadline_s": 600}
            return {
                "submit": await trips("POST", "/v1/jobs", json=body),
                "poll": await trips("GET", f"/v1/jobs/{submit(empty_valkey, 60)[0]}"),
                "page": await trips("GET", "/v1/jobs?limit=50"),
                "page of one status": await trips("GET", "/v1/jobs?limit=50&status=queued"),
            }

    # A page and a submission look the key up first; a submission counts against the rate, and reads once a second who serves what.
    found = asyncio.run(count())
    assert found["poll"] == 1 and found["page"] == found["page of one status"] == 2
    assert found["submit"] in (3, 4)
