"""Clients over fakeredis and the fake worker: both must behave alike, so most tests run through both."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import socket
import threading
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from latentline import AsyncClient, Client, records, routing
from latentline.connection import connect
from latentline.errors import BrokerUnavailable, IdempotencyConflict, InvalidRequest, JobFailed, JobNotFound, StoreUnavailable, WaitTimeout
from latentline.jobs import JobError, JobEvent, JobRequest, Phase, Status
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


@pytest.fixture
def worker(server: fakeredis.FakeServer, images: FakeImages) -> FakeWorker:
    worker = FakeWorker(fakeredis.FakeRedis(server=server, decode_responses=True), images)
    worker.announce()
    return worker


@pytest.fixture(params=["sync", "async"])
def client(
    request: pytest.FixtureRequest, server: fakeredis.FakeServer, images: FakeImages, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    monkeypatch.setattr("latentline.client.Images", lambda settings: images)
    monkeypatch.setattr("latentline.client.connect", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))
    monkeypatch.setattr("latentline.client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=server, decode_responses=True))
    if request.param == "sync":
        with Client(Settings()) as made:
            yield made
        return
    with asyncio.Runner() as runner:
        asynchronous = AsyncClient(Settings())
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
    job_id = client.submit(prompt="a cat", num_inference_steps=1).id
    worker.run_all()
    assert worker.records.get(job_id).images[0].url is None
    assert client.get(job_id).images[0].url
    assert client.list()[0][0].images[0].url


def test_submit_takes_a_request_too(client: Any, worker: FakeWorker) -> None:
    request = JobRequest.parse({"prompt": "a cat", "seed": 3})
    assert client.submit(request).request.seed == 3


def test_many_are_queued_in_order(client: Any, worker: FakeWorker) -> None:
    made = client.submit_many([JobRequest.parse({"prompt": f"cat {i}", "num_inference_steps": 1}) for i in range(7)])
    assert [record.request.prompt for record in made] == [f"cat {i}" for i in range(7)]
    assert [record.id for record in worker.run_all()] == [record.id for record in made]


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
    worker.records.announce(worker.name, MODEL.model_copy(update={"id": "coarse", "size_multiple": 64, "schedulers": ("ddim",)}))
    with pytest.raises(InvalidRequest, match="a multiple of 64"):
        client.submit(prompt="a cat", model="coarse", width=72, scheduler="ddim")
    with pytest.raises(InvalidRequest, match="one of: ddim"):
        client.submit(prompt="a cat", model="coarse", scheduler="euler")


def test_no_worker_has_come_yet(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="none has announced one yet"):
        client.submit(prompt="a cat")


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


def test_models(client: Any, worker: FakeWorker) -> None:
    assert client.models() == {MODEL.id: MODEL}


def test_events_arrive_while_the_job_runs(server: fakeredis.FakeServer, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.client.Images", lambda settings: FakeImages())
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
    (record,) = records.run(client, records.submit([JobRequest.parse({"prompt": "a cat", "deadline_s": 600})], 600))
    claim = worker.records.claim(record.id, worker.name, 30)
    client.hset(f"latentline:job:{record.id}", "deadline_at", 1)
    assert claim is not None
    done = worker.finish(claim)
    assert done.error is not None and done.error.code == "deadline_exceeded"
