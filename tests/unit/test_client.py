"""Clients over fakeredis and the fake worker: both must behave alike, so most tests run through both."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import inspect
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis

from latentline import AsyncClient, Client, models, records, routing
from latentline.connection import connect
from latentline.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    NoWorker,
    StoreUnavailable,
    TenantQuotaExceeded,
    WaitTimeout,
)
from latentline.jobs import ImageRef, JobError, JobEvent, JobRecord, JobRequest, Phase, Status, StoredOutput, resolve
from latentline.models import ModelInfo, ServedModel
from latentline.records import CachedFleet
from latentline.records.fleet import CACHED_S
from latentline.settings import Settings
from latentline.testing import MODEL, TINY_PNG, FakeImages, FakeWorker


class Both:
    """The asynchronous client behind the synchronous one's methods, so that one test serves both."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self._client, name)(*args, **kwargs)
            return self._runner.run(self._collect(result) if inspect.isasyncgen(result) else result)

        return call

    @staticmethod
    async def _collect(items: Any) -> list[Any]:
        return [item async for item in items]


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def images() -> FakeImages:
    return FakeImages()


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is logged once in a process."""
    monkeypatch.setattr(importlib.import_module("latentline.records.fleet"), "_unreadable", set())


@pytest.fixture
def worker(server: fakeredis.FakeServer, images: FakeImages) -> FakeWorker:
    worker = FakeWorker(fakeredis.FakeRedis(server=server, decode_responses=True), images)
    worker.announce()
    return worker


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one element is the time by which clients judge how old the announcements are that they have read."""
    now = [1000.0]
    monkeypatch.setattr("latentline.operations.CachedFleet", lambda: CachedFleet(lambda: now[0]))
    return now


@pytest.fixture(params=["sync", "async"])
def client(
    request: pytest.FixtureRequest,
    server: fakeredis.FakeServer,
    images: FakeImages,
    settings: Settings,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    monkeypatch.setattr("latentline.operations.Images", lambda settings: images)
    monkeypatch.setattr("latentline.client.connect", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))
    monkeypatch.setattr("latentline.async_client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=server, decode_responses=True))
    if request.param == "sync":
        with Client(settings) as made:
            yield made
        return
    with asyncio.Runner() as runner:
        asynchronous = AsyncClient(settings)
        yield Both(asynchronous, runner)
        runner.run(asynchronous.close())


def test_submit_work_wait_download(client: Any, worker: FakeWorker, images: FakeImages) -> None:
    record = client.submit(prompt="a cat", num_inference_steps=3, num_images=2, seed=7)
    assert (record.status, client.get(record.id).queue_position) == (Status.QUEUED, 0)
    assert (record.request.width, record.request.height) == (MODEL.default_width, MODEL.default_height)
    worker.run_all()
    done = client.wait(record.id, timeout_s=5, check=True)
    assert [image.seed for image in done.images] == [7, 8]
    for image in done.images:
        assert image.url == f"memory://{image.key}"
        assert hashlib.sha256(images.download(image.key)).hexdigest() == image.sha256
    assert images.download(done.images[0].key) == TINY_PNG


def test_urls_are_made_when_read_and_never_stored(client: Any, worker: FakeWorker) -> None:
    """A stored one would outlive its signature, and give the object to whoever reads the broker."""
    job_id = client.submit(prompt="a cat", num_inference_steps=1).id
    claim = worker.records.claim(job_id, worker.name, 30)
    assert claim is not None
    image = ImageRef(
        key="k", seed=1, width=1, height=1, content_type="image/png", sha256="0" * 64, num_bytes=1, url="https://signed.example/k"
    )
    worker.records.settle(job_id, claim.token, Status.SUCCEEDED, images=[image])
    stored = worker.redis.hgetall(routing.job_key(job_id))
    assert '"key"' in stored["images"] and "signed.example" not in json.dumps(stored)
    assert records.run(worker.redis, records.get(job_id)).images[0].url is None
    assert client.get(job_id).images[0].url == client.list()[0][0].images[0].url == "memory://k"


def test_the_fake_worker_leaves_a_job_that_was_deleted_before_its_claim(client: Any, worker: FakeWorker) -> None:
    """The wake-up of a deleted job stays in its queue."""
    gone, kept = client.submit(prompt="a cat"), client.submit(prompt="a dog")
    client.cancel(gone.id)
    client.delete(gone.id)
    assert [record.id for record in worker.run_all()] == [kept.id]


def test_submit_takes_a_request_too(client: Any, worker: FakeWorker) -> None:
    request = JobRequest.parse({"prompt": "a cat", "seed": 3})
    assert client.submit(request).request.seed == 3


def test_the_request_of_a_record_can_be_submitted_again(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="a cat", output={"format": "webp"}, metadata={"order": 7})
    again = client.submit(first.request)
    assert again.id != first.id and again.request == first.request
    with pytest.raises(InvalidRequest, match=r"output\.format"):
        client.submit(first.request.model_copy(update={"output": StoredOutput(format="avif")}))


def test_many_are_queued_in_order(client: Any, worker: FakeWorker) -> None:
    made = client.submit_many([JobRequest.parse({"prompt": f"cat {i}", "num_inference_steps": 1}) for i in range(7)])
    assert [record.request.prompt for record in made] == [f"cat {i}" for i in range(7)]
    assert [record.id for record in worker.run_all()] == [record.id for record in made]


def test_the_request_of_a_record_with_a_key_is_a_new_job(client: Any, worker: FakeWorker) -> None:
    """Its key stands for what was sent then, before the defaults were filled in."""
    first = client.submit(prompt="a cat", idempotency_key="k")
    again = client.submit(first.request)
    assert again.id != first.id and again.request == first.request.model_copy(update={"idempotency_key": None})
    assert client.submit(prompt="a cat", idempotency_key="k").id == first.id


def requests_of(*fields: dict[str, Any]) -> list[JobRequest]:
    return [JobRequest.parse({"prompt": "a cat", "num_inference_steps": 1, **one}) for one in fields]


def test_every_outcome_of_many_is_told_in_order(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="a cat", num_inference_steps=1, idempotency_key="k")
    outcomes = client.submit_many(
        requests_of(
            {}, {"model": "no-such"}, {"idempotency_key": "k", "seed": 1}, {"idempotency_key": "k"}, {"scheduler": "magic"}, {"seed": 7}
        )
    )
    assert [type(outcome) for outcome in outcomes] == [
        JobRecord, InvalidRequest, IdempotencyConflict, JobRecord, InvalidRequest, JobRecord,
    ]  # fmt: skip
    assert outcomes[3].id == first.id and outcomes[5].request.seed == 7
    accepted = [first.id, outcomes[0].id, outcomes[5].id]
    assert [record.id for record in worker.run_all()] == accepted


def test_a_submission_that_the_broker_fails_on_costs_no_other_its_outcome(client: Any, worker: FakeWorker) -> None:
    worker.redis.set(routing.idempotency_key("default", "k"), "not a hash")
    outcomes = client.submit_many(requests_of({}, {"idempotency_key": "k"}, {"seed": 7}))
    assert [type(outcome) for outcome in outcomes] == [JobRecord, BrokerUnavailable, JobRecord]
    assert {outcomes[0].id, outcomes[2].id} == {record.id for record in client.list()[0]}


def test_a_key_whose_job_cannot_be_read_costs_no_other_its_outcome(
    client: Any, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.submit(prompt="a cat", num_inference_steps=1, idempotency_key="k")
    (request,) = requests_of({"idempotency_key": "k"})

    def refused(_: str) -> Any:
        def call(_: object) -> None:
            raise redis.ResponseError("MISCONF")

        yield call

    monkeypatch.setattr("latentline.records.jobs.get", refused)
    outcomes = client.submit_many([*requests_of({}), request, *requests_of({})])
    assert [type(outcome) for outcome in outcomes] == [JobRecord, BrokerUnavailable, JobRecord]


@pytest.mark.parametrize("settings", [Settings(tenant_cap=9)])
def test_a_tenants_cap(client: Any, worker: FakeWorker) -> None:
    """Exactly the cap is taken, and one job always; each request counts what those before it have taken."""
    three_rows = {"num_inference_steps": 3, "guidance_scale": 1.0}
    large = {"num_inference_steps": 10, "guidance_scale": 1.0, "tenant": "large"}
    outcomes = client.submit_many(requests_of(three_rows, three_rows, three_rows, three_rows | {"idempotency_key": "k"}, large, large))
    assert [isinstance(outcome, JobRecord) for outcome in outcomes] == [True, True, True, False, True, False]
    assert all(isinstance(outcomes[i], TenantQuotaExceeded) for i in (3, 5))
    assert "9 rows queued and running: 3 more exceed the 9 allowed" in outcomes[3].message
    client.cancel(outcomes[0].id)
    assert client.submit(prompt="a cat", **three_rows, idempotency_key="k").status is Status.QUEUED, "a refused key is still free"
    with pytest.raises(TenantQuotaExceeded):
        client.submit(prompt="a cat", num_inference_steps=1, guidance_scale=1.0)


def test_a_broker_that_fails_in_between_leaves_no_outcome_out(
    client: Any, worker: FakeWorker, server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accepted before is told, what may have been accepted is an error."""
    monkeypatch.setattr("latentline.operations.SUBMIT_CHUNK", 2)
    write, written = records.submit, 0

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        written += 1
        server.connected = written <= 2
        return write(*args, **kwargs)

    monkeypatch.setattr("latentline.records.submit", fails_later)
    outcomes = client.submit_many(requests_of(*[{}] * 3, {"scheduler": "magic"}, *[{}] * 4))
    server.connected = True
    assert written == 3, "a broker that is away takes seconds to say so: once is enough"
    assert [type(outcome) for outcome in outcomes] == [JobRecord] * 3 + [InvalidRequest, JobRecord] + [BrokerUnavailable] * 3
    assert {outcome.id for outcome in outcomes if isinstance(outcome, JobRecord)} == {record.id for record in client.list()[0]}


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"model": "no-such"}, "model", f"one of: {MODEL.id}"),
        ({"width": 256, "height": 264}, "width", "at most 65536"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"promt": "typo"}, "promt", "known fields"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_it_is_queued(
    client: Any, worker: FakeWorker, fields: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submit(**{"prompt": "a cat", **fields})
    assert caught.value.field == field and allowed in caught.value.allowed
    assert worker.take() is None and client.list() == ([], None)


def test_the_models_own_multiple_and_schedulers_count(client: Any, worker: FakeWorker) -> None:
    worker.records.announce(worker.name, [MODEL.model_copy(update={"id": "coarse", "size_multiple": 64, "schedulers": ("ddim",)})])
    with pytest.raises(InvalidRequest, match="a multiple of 64"):
        client.submit(prompt="a cat", model="coarse", width=72, scheduler="ddim")
    with pytest.raises(InvalidRequest, match="one of: ddim"):
        client.submit(prompt="a cat", model="coarse", scheduler="euler")


def test_no_worker_has_come_yet(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="none has announced one yet"):
        client.submit(prompt="a cat")
    assert client.models() == {}


# What workers announce


def age(worker: FakeWorker, seconds: float, *keys: str) -> None:
    """Make announcements older."""
    for key in keys or (routing.announced_at_key(), routing.workers_key()):
        for name, at in worker.redis.zrange(key, 0, -1, withscores=True):
            worker.redis.zadd(key, {name: at - seconds})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that the announcements are read."""
    module = importlib.import_module("latentline.records.fleet")
    read, done = module.fleet, []

    def counted() -> Any:
        done.append("read")
        return read()

    monkeypatch.setattr(module, "fleet", counted)
    return done


def test_announcements_are_read_once_a_second(client: Any, worker: FakeWorker, clock: list[float], reads: list[str]) -> None:
    for _ in range(3):
        client.submit(prompt="a cat")
    assert len(reads) == 1
    clock[0] += CACHED_S - 0.01
    client.submit_many([JobRequest.parse({"prompt": "a cat"})] * 2)
    assert len(reads) == 1
    clock[0] += 0.01
    client.submit(prompt="a cat")
    client.submit(prompt="a cat")
    assert len(reads) == 2


def test_announcements_are_read_again_before_a_request_is_refused(
    client: Any, worker: FakeWorker, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has just been announced counts at once: a new model, a larger size, a higher level."""
    monkeypatch.setattr(models, "ADDED", {"preview_every": 4})
    client.submit(prompt="a cat")
    asking: list[dict[str, Any]] = [{"model": "new"}, {"width": 512, "height": 512}, {"preview_every": 2}]
    for fields in asking:
        with pytest.raises(InvalidRequest):
            client.submit(prompt="a cat", **fields)
    assert len(reads) == 4
    larger = MODEL.model_copy(update={"max_pixels": 512 * 512})
    newer = FakeWorker(worker.redis, worker.images, name=worker.name, model=larger, level=4)
    newer.announce()
    worker.records.announce("other", [MODEL.model_copy(update={"id": "new"})])
    for fields in asking:
        assert client.submit(prompt="a cat", **fields).status is Status.QUEUED
    assert len(reads) == 5, "read once more, and then it is known"


def test_in_a_batch_the_rest_is_checked_against_the_same_announcements(client: Any, worker: FakeWorker, reads: list[str]) -> None:
    client.submit(prompt="a cat")
    good, bad = JobRequest.parse({"prompt": "a cat"}), JobRequest.parse({"prompt": "a cat", "model": "no-such"})
    outcomes = client.submit_many([good, bad, good])
    assert [isinstance(outcome, InvalidRequest) for outcome in outcomes] == [False, True, False]
    assert len(reads) == 2 and len(client.list()[0]) == 3, "what is accepted is written once"


def test_what_is_left_out_is_resolved_by_the_models_announcement(client: Any, worker: FakeWorker) -> None:
    own = {
        "id": "own", "default_width": 96, "default_num_inference_steps": 4, "default_guidance_scale": 1.0, "default_scheduler": "lcm",
    }  # fmt: skip
    worker.records.announce("other", [MODEL.model_copy(update=own)])
    record = client.submit(prompt="a cat", model="own")
    request = client.get(record.id).request
    assert (request.width, request.height, request.num_inference_steps, request.guidance_scale, request.scheduler) == (
        96,
        64,
        4,
        1.0,
        "lcm",
    )
    assert (record.num_steps, worker.redis.hget(routing.job_key(record.id), "cost")) == (4, "4")
    stored = worker.redis.hget(routing.job_key(record.id), "request")
    assert '"num_inference_steps":4' in stored and "negative_prompt" not in stored


def test_the_key_stands_for_what_was_sent_whatever_the_defaults_are_by_now(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="a cat", idempotency_key="k")
    worker.records.announce(worker.name, [MODEL.model_copy(update={"default_num_inference_steps": 7, "default_width": 128})])
    again = client.submit(prompt="a cat", idempotency_key="k")
    assert (again.id, again.num_steps) == (first.id, 20)
    with pytest.raises(IdempotencyConflict):
        client.submit(prompt="a cat", num_inference_steps=20, idempotency_key="k")


def test_a_key_that_version_0_1_0_has_written(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="a cat", idempotency_key="k")
    key = routing.idempotency_key("default", "k")
    assert worker.redis.hget(key, "fingerprint") == '{"height":64,"prompt":"a cat","width":64}', "what that version compares"
    worker.redis.hdel(key, "sent")
    assert client.submit(prompt="a cat", idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflict):
        client.submit(prompt="a dog", idempotency_key="k")


def test_a_worker_that_says_nothing_is_not_counted_on(client: Any, worker: FakeWorker, clock: list[float]) -> None:
    client.submit(prompt="a cat")
    age(worker, 55)
    assert set(client.models()) == {MODEL.id} and client.workers() == []
    client.submit(prompt="a cat")
    age(worker, 6)
    clock[0] += CACHED_S
    assert client.models() == {}
    with pytest.raises(NoWorker, match="no worker that serves 'latentline-emoji'") as caught:
        client.submit(prompt="a cat")
    assert caught.value.http_status == 503 and caught.value.retry_after_s
    worker.records.announce("other", [MODEL.model_copy(update={"id": "other"})])
    assert set(client.models()) == {"other"}, "one worker's word keeps no other's model alive"
    with pytest.raises(InvalidRequest, match="one of: other"):
        client.submit(prompt="a cat", model="no-such")
    assert worker.redis.hkeys(routing.announced_key()) == ["other"], "nothing is kept of workers that are gone"
    worker.announce()
    client.submit(prompt="a cat")


def test_a_worker_of_version_0_1_0_is_seen_while_it_lives(client: Any, worker: FakeWorker, clock: list[float]) -> None:
    worker.redis.flushall()
    worker.redis.hset(routing.models_key(), "old", MODEL.model_copy(update={"id": "old"}).first_fields())
    worker.redis.zadd(routing.workers_key(), {"old@host": worker.redis.time()[0]})
    assert set(client.models()) == {"old"}
    record = client.submit(prompt="a cat", model="old")
    assert (record.num_steps, record.request.scheduler, record.request.width) == (20, "dpmpp_2m", 64)
    own = MODEL.model_copy(update={"default_num_inference_steps": 4})
    worker.records.announce(worker.name, [own])
    assert set(client.models()) == {"old", MODEL.id}
    assert client.models()[MODEL.id] == served(own), "what it announces counts, and not what it writes for the older ones"
    age(worker, 11, routing.workers_key())
    clock[0] += CACHED_S
    worker.announce()
    assert set(client.models()) == {MODEL.id}
    with pytest.raises(NoWorker):
        client.submit(prompt="a cat", model="old")


def test_version_0_1_0_finds_what_it_knows(worker: FakeWorker) -> None:
    """It refuses a field that it does not know."""
    (told,) = worker.redis.hvals(routing.models_key())
    assert set(json.loads(told)) == {"id", "family", "default_width", "default_height", "size_multiple", "max_pixels", "schedulers"}


def test_workers_of_two_versions_do_not_change_the_answer_from_second_to_second(client: Any, worker: FakeWorker) -> None:
    one = MODEL.model_copy(update={"default_num_inference_steps": 4, "max_pixels": 128 * 128, "schedulers": ("lcm", "ddim", "euler")})
    other = MODEL.model_copy(update={"default_num_inference_steps": 9, "size_multiple": 16, "schedulers": ("ddim", "lcm", "tcd")})
    worker.redis.flushall()
    worker.records.announce("b", [other])
    seen = []
    for name, info in (("a", one), ("b", other)) * 2:
        worker.records.announce(name, [info])
        seen.append(client.models()[MODEL.id])
    assert seen == seen[:1] * 4
    # Any of them may get the job, so all have to be able to do it.
    shared = client.models()[MODEL.id]
    assert (shared.max_pixels, shared.size_multiple, sorted(shared.schedulers)) == (128 * 128, 16, ["ddim", "lcm"])
    for refused in ({"scheduler": "euler"}, {"scheduler": "tcd"}, {"width": 72}, {"width": 256, "height": 256}):
        with pytest.raises(InvalidRequest):
            client.submit(prompt="a cat", **refused)


def test_an_announcement_that_cannot_be_read_costs_no_other(client: Any, worker: FakeWorker, caplog: pytest.LogCaptureFixture) -> None:
    seconds = worker.redis.time()[0]
    texts = {"a": "not JSON", "b": "[]", "c": '{"level": "high", "models": []}', "d": '{"level": 1, "models": [{"id": "x"}]}', "e": "{}"}
    worker.redis.hset(routing.announced_key(), mapping=texts)
    worker.redis.zadd(routing.announced_at_key(), dict.fromkeys([*texts, "without a word"], seconds))
    assert set(client.models()) == {MODEL.id}
    assert set(client.models()) == {MODEL.id}
    assert all(caplog.text.count(f"worker {name} ") == 1 for name in texts), "once for each, not at each call"


def test_a_model_of_version_0_1_0_that_cannot_be_read_costs_no_other(
    client: Any, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.redis.hset(routing.models_key(), mapping={"old": MODEL.model_copy(update={"id": "old"}).first_fields(), "bad": "{}"})
    worker.redis.zadd(routing.workers_key(), {"old@host": worker.redis.time()[0]})
    assert set(client.models()) == {MODEL.id, "old"}
    assert client.submit(prompt="a cat", model="old").status is Status.QUEUED
    assert [message.startswith("the announcement of model bad ") for message in caplog.messages] == [True], "not at each call"
    worker.redis.hset(routing.models_key(), "bad", MODEL.model_copy(update={"id": "bad"}).first_fields())
    assert "bad" in client.models()
    worker.redis.hset(routing.models_key(), "bad", "[]")
    assert "bad" not in client.models() and len(caplog.messages) == 2


# Levels


@pytest.fixture
def level_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coming version of requests."""
    monkeypatch.setattr(models, "ADDED", {"preview_every": 4, "scheduler=newest": 4})


def queued(worker: FakeWorker, level: int) -> int:
    return sum(worker.redis.llen(routing.queue_list(name, 5)) for name in routing.queue_names(MODEL.id, level))


def test_a_job_of_a_higher_level_is_refused_while_no_worker_has_it(client: Any, worker: FakeWorker, level_4: None) -> None:
    with pytest.raises(InvalidRequest, match="they have level 2, this needs level 4") as caught:
        client.submit(prompt="a cat", preview_every=1)
    assert (caught.value.field, caught.value.value) == ("preview_every", 1)
    with pytest.raises(InvalidRequest, match=r"scheduler: got 'newest'; allowed: one of: ddim, "):
        client.submit(prompt="a cat", scheduler="newest")
    client.submit(prompt="a cat")
    assert queued(worker, 1) == 1


def test_only_workers_of_its_level_take_a_job(client: Any, worker: FakeWorker, images: FakeImages, level_4: None) -> None:
    newer = FakeWorker(worker.redis, images, name="newer@test", level=4)
    newer.announce()
    plain, higher = client.submit(prompt="a cat"), client.submit(prompt="a cat", preview_every=1)
    assert worker.redis.hget(routing.job_key(plain.id), "level") is None, "level 1 is what records of before had"
    assert worker.redis.hget(routing.job_key(higher.id), "level") == "4"
    assert (queued(worker, 1), queued(worker, 4)) == (1, 2)
    assert [record.id for record in worker.run_all()] == [plain.id]
    assert worker.records.claim(higher.id, worker.name, 30) is None, "not even when a message of it reaches the wrong queue"
    assert client.get(higher.id).status is Status.QUEUED
    claim = newer.records.claim(str(newer.take()), newer.name, 30)
    assert claim is not None and newer.records.release(higher.id, claim.token)
    assert worker.take() is None, "what comes back goes to its own queue again"
    assert [record.id for record in newer.run_all()] == [higher.id]


def test_a_long_prompt_is_recognised_under_its_idempotency_key_and_not_stored_with_it(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="x" * 32_000, idempotency_key="k")
    assert client.submit(prompt="x" * 32_000, idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflict):
        client.submit(prompt="x" * 31_999 + "y", idempotency_key="k")
    assert sum(map(len, worker.redis.hgetall(routing.idempotency_key("default", "k")).values())) < 500


@pytest.mark.parametrize(("field", "value"), [("num_images", 10), ("prompt", "x" * 32_000)])
def test_what_goes_beyond_level_1_waits_for_workers_that_can_read_it(
    client: Any, worker: FakeWorker, images: FakeImages, field: str, value: Any
) -> None:
    older = FakeWorker(worker.redis, images, name=worker.name, level=1)
    older.announce()
    asked = {"prompt": "a cat", "num_inference_steps": 1, field: value}
    with pytest.raises(InvalidRequest, match="they have level 1, this needs level 2") as caught:
        client.submit(**asked)
    assert caught.value.field == field
    newer = FakeWorker(worker.redis, images, name="newer@test")
    newer.announce()
    job = client.submit(**asked)
    assert older.take() is None and older.records.claim(job.id, older.name, 30) is None
    (done,) = newer.run_all()
    assert done.status is Status.SUCCEEDED and len(done.images) == job.request.num_images


def test_a_lost_message_of_a_higher_level_is_written_anew_by_any_worker(
    client: Any, worker: FakeWorker, images: FakeImages, level_4: None
) -> None:
    newer = FakeWorker(worker.redis, images, name="newer@test", level=4)
    newer.announce()
    job_id = client.submit(prompt="a cat", preview_every=1).id
    assert newer.take() == job_id  # and is lost
    assert worker.records.wake(MODEL.id, 0) == [job_id]
    assert worker.take() is None and newer.take() == job_id


def test_the_limits_that_count_are_those_of_the_workers_that_can_take_it(
    client: Any, worker: FakeWorker, images: FakeImages, level_4: None
) -> None:
    wider = MODEL.model_copy(update={"max_pixels": 512 * 512, "schedulers": ("newest", "ddim", "dpmpp_2m")})
    newer = FakeWorker(worker.redis, images, name="newer@test", level=4, model=wider)
    newer.announce()
    assert client.submit(prompt="a cat", width=512, height=512, preview_every=1).request.width == 512
    assert client.submit(prompt="a cat", scheduler="newest").request.scheduler == "newest"
    with pytest.raises(InvalidRequest, match="at most 65536"):
        client.submit(prompt="a cat", width=512, height=512)
    with pytest.raises(InvalidRequest, match="one of: newest, ddim, dpmpp_2m"):
        client.submit(prompt="a cat", scheduler="euler", preview_every=1)


def test_a_record_of_another_version_breaks_no_list(client: Any, worker: FakeWorker) -> None:
    made = [client.submit(prompt="a cat", seed=i).id for i in range(5)]
    key = routing.job_key(made[2])
    worker.redis.hset(key, "request", str(worker.redis.hget(key, "request")).replace('"version":1', '"version":2'))
    found, cursor = client.list(limit=2)
    while cursor:  # it has a place on its page, which is shorter by it
        page, cursor = client.list(limit=2, cursor=cursor)
        found += page
    assert {record.id for record in found} == set(made) - {made[2]}
    with pytest.raises(JobNotFound, match="cannot read"):
        client.get(made[2])


def test_a_record_of_a_newer_release_is_read_worked_on_and_listed(client: Any, worker: FakeWorker) -> None:
    job_id = client.submit(prompt="a cat", num_inference_steps=1).id
    key = routing.job_key(job_id)
    newer = json.loads(str(worker.redis.hget(key, "request"))) | {"style": "oil", "scheduler": "newest", "output": {"depth": 16}}
    worker.redis.hset(key, mapping={"request": json.dumps(newer), "phase": "upscaling", "novelty": "1"})
    assert client.get(job_id).request.scheduler == "newest" and client.get(job_id).phase == "upscaling"
    assert [record.id for record in client.list()[0]] == [job_id]
    assert [record.status for record in worker.run_all()] == [Status.SUCCEEDED]
    worker.redis.xadd(routing.events_key(job_id), {"type": "job.praised", "at": "1", "data": "{}"})
    assert list(client.events(job_id))[-1].type == "job.praised"


def test_a_store_that_is_down_fails_the_submit(client: Any, worker: FakeWorker, images: FakeImages) -> None:
    images.down = True
    with pytest.raises(StoreUnavailable):
        client.submit(prompt="a cat")
    images.down = False
    assert client.list() == ([], None)


def test_idempotency_reaches_the_caller(client: Any, worker: FakeWorker) -> None:
    first = client.submit(prompt="a cat", idempotency_key="k")
    assert client.submit(prompt="a cat", idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflict):
        client.submit(prompt="a dog", idempotency_key="k")


def test_cancel_before_and_during(client: Any, worker: FakeWorker) -> None:
    queued, running = client.submit(prompt="a cat"), client.submit(prompt="a dog")
    assert client.cancel(queued.id).status is Status.CANCELLED
    claim = worker.records.claim(running.id, "w", 30)
    assert claim is not None and client.cancel(running.id).cancel_requested
    assert worker.finish(claim).status is Status.CANCELLED
    with pytest.raises(JobFailed, match="cancelled"):
        client.wait(running.id, timeout_s=5, check=True)
    assert client.wait(running.id, timeout_s=5).status is Status.CANCELLED


def test_wait_on_a_failed_job_says_why(client: Any, worker: FakeWorker) -> None:
    worker.fail_with = JobError(code="numerical_error", message="not finite")
    job_id = client.submit(prompt="a cat", num_inference_steps=1).id
    worker.run_all()
    assert client.wait(job_id, timeout_s=5).error == worker.fail_with
    with pytest.raises(JobFailed, match="numerical_error: not finite"):
        client.wait(job_id, timeout_s=5, check=True)


def test_wait_gives_up_and_the_job_goes_on(client: Any, worker: FakeWorker) -> None:
    job_id = client.submit(prompt="a cat").id
    with pytest.raises(WaitTimeout, match=job_id):
        client.wait(job_id, timeout_s=0.05)
    assert client.get(job_id).status is Status.QUEUED


def test_events_tell_the_whole_story_and_end(client: Any, worker: FakeWorker) -> None:
    job_id = client.submit(prompt="a cat", num_inference_steps=2).id
    worker.run_all()
    story = list(client.events(job_id))
    assert [event.type for event in story] == ["job.queued", "job.running", *["job.progress"] * 3, "job.succeeded"]
    assert [(e.data["phase"], e.data["step"], e.data["num_steps"]) for e in story if e.type == "job.progress"] == [
        (Phase.DENOISING, 1, 2), (Phase.DENOISING, 2, 2), (Phase.UPLOADING, 2, 2),
    ]  # fmt: skip
    assert list(client.events(job_id, last_event_id=story[2].id)) == story[3:]


def test_unknown_ids(client: Any) -> None:
    for call in (client.get, client.cancel, client.wait):
        with pytest.raises(JobNotFound):
            call("no-such-job")
    with pytest.raises(JobNotFound):
        list(client.events("no-such-job"))


def test_list_pages_and_filters(client: Any, worker: FakeWorker) -> None:
    made = [client.submit(prompt="a cat", num_inference_steps=1).id for _ in range(5)]
    client.cancel(made[0])
    assert [record.id for record in client.list(status="cancelled")[0]] == [made[0]]
    first, cursor = client.list(limit=3)
    second, end = client.list(limit=3, cursor=cursor)
    assert sorted(record.id for record in first + second) == sorted(made) and end is None
    with pytest.raises(InvalidRequest, match="status"):
        client.list(status="done")


def served(info: ModelInfo, **here: int) -> ServedModel:
    return ServedModel(**dict(info), **{"workers": 1, "warm": 1, **here})


def test_a_model_that_no_worker_has_in_memory_is_served_all_the_same(client: Any, worker: FakeWorker) -> None:
    other = MODEL.model_copy(update={"id": "other"})
    worker.records.announce(worker.name, [MODEL, other], cold=["other"], swaps={"other": 3})
    worker.records.announce("second", [other], swaps={"other": 2})
    assert client.models() == {MODEL.id: served(MODEL), "other": served(other, workers=2, warm=1, swaps=5)}
    worker.records.announce("second", [other], cold=["other"])
    assert client.models()["other"].warm == 0
    assert client.submit(prompt="a cat", model="other").status is Status.QUEUED


def test_models(client: Any, worker: FakeWorker) -> None:
    assert client.models() == {MODEL.id: served(MODEL)}


def test_events_arrive_while_the_job_runs(server: fakeredis.FakeServer, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.operations.Images", lambda settings: FakeImages())
    monkeypatch.setattr("latentline.client.connect", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))
    with Client(Settings()) as client:
        job_id = client.submit(prompt="a cat", num_inference_steps=2).id
        seen: list[JobEvent] = []
        queued = threading.Event()

        def watch() -> None:
            for event in client.events(job_id):
                seen.append(event)
                queued.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert queued.wait(30)  # the watcher has read what there was and now waits for more
        worker.run_all()
        watcher.join(30)
        assert not watcher.is_alive() and seen[-1].type == "job.succeeded"


def test_a_broker_that_accepts_and_never_answers_is_an_error_within_five_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)  # the kernel accepts; nobody reads
        client = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        with pytest.raises(BrokerUnavailable):
            records.run(client, records.models())
        client.close()
        silent.setblocking(False)
        num_attempts = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                num_attempts += 1
        # Counted, not timed: each attempt ends after the socket's time limit.
        assert num_attempts >= 1 and num_attempts * client.connection_pool.connection_kwargs["socket_timeout"] <= 5


def test_a_job_cancelled_in_the_queue_expires_as_every_ended_job(client: Any, worker: FakeWorker) -> None:
    job_id = client.submit(prompt="a cat").id
    client.cancel(job_id)
    assert worker.redis.ttl(routing.job_key(job_id)) > 0 and worker.redis.ttl(routing.events_key(job_id)) > 0


def test_the_fake_worker_obeys_a_deadline(server: fakeredis.FakeServer, worker: FakeWorker) -> None:
    client = fakeredis.FakeRedis(server=server, decode_responses=True)
    (record,) = records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat", "deadline_s": 600}))], 600))
    claim = worker.records.claim(record.id, worker.name, 30)
    client.hset(f"latentline:job:{record.id}", "deadline_at", 1)
    assert claim is not None
    done = worker.finish(claim)
    assert done.error is not None and done.error.code == "deadline_exceeded"
