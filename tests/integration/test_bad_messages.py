"""Bad messages in a queue: each becomes a dead letter with its cause, and the worker goes on."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from support.jobs import PATIENCE_S, run_worker
from support.stubs import RunnerBench

from latentline import records, routing
from latentline.errors import JobNotFound
from latentline.jobs import JobRequest, Status, resolve
from latentline.records import Records
from latentline.testing import MODEL
from latentline_worker.settings import WorkerSettings
from latentline_worker.transport.app import create_app

PROMPT = "a very private prompt"
QUEUE = routing.queue_name(MODEL.id)
ANNOTATIONS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    return empty_valkey


class Bench:
    """A real Celery worker with the real delivery policy and the real runner; only engine and object store are stand-ins."""

    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client, self.store = client, Records(client)
        self._work = RunnerBench(self.store, at_once=True)
        self.app: Celery = create_app(WorkerSettings.model_validate({"redis_url": url}), routing.queue_names(MODEL.id), self.store, 16)
        self.app.task(self._work.runner.run, name=routing.GENERATE_TASK, shared=False)

    def next_job(self) -> str:
        """The next job that reached the engine."""
        return self._work.engine.submitted.get(timeout=PATIENCE_S).work.job_id

    def submit(self) -> str:
        request = JobRequest.parse({"prompt": PROMPT, "num_inference_steps": 2})
        return records.run(self.client, records.submit([resolve(request)], 600))[0].id

    def run(self) -> Any:
        return run_worker(self.app, loglevel="INFO")

    def put(self, raw: str | bytes) -> None:
        """At the end of the queue: the worker takes what came first."""
        self.client.lpush(QUEUE, raw)

    def all_acknowledged(self) -> None:
        """Wait until Celery has acknowledged every message, which it does after the task has ended."""
        for _ in range(PATIENCE_S * 100):
            if not self.client.hlen(routing.GENERATE_UNACKED):
                return
            threading.Event().wait(0.01)
        pytest.fail("a message stays unacknowledged")

    def letters(self) -> list[dict[str, Any]]:
        return records.run(self.client, records.dead_letters())


@pytest.fixture
def bench(client: redis.Redis, valkey_url: str) -> Iterator[Bench]:
    made = Bench(client, valkey_url)
    yield made
    made.app.close()


def envelope(task: str = routing.GENERATE_TASK, argument: str = "nobody") -> dict[str, Any]:
    made: dict[str, Any] = json.loads(routing.wake_up(task, argument, QUEUE, 0, "m1"))
    return made


def with_body(body: Any) -> str:
    """A wake-up whose body is this text, or this as JSON."""
    return json.dumps(envelope() | {"body": body if isinstance(body, str) else json.dumps(body)})


def with_headers(**headers: Any) -> str:
    made = envelope()
    made["headers"] |= headers
    return json.dumps(made)


def without_header(name: str) -> str:
    made = envelope()
    del made["headers"][name]
    return json.dumps(made)


def with_properties(**properties: Any) -> str:
    made = envelope()
    made["properties"] |= properties
    return json.dumps(made)


BAD: dict[str, str | bytes] = {
    "bytes that are no text": b"\xff\xfe\x00\x80" + PROMPT.encode(),
    "text that is no JSON": f"prompt: {PROMPT}",
    "nothing": b"",
    "JSON without properties": json.dumps({"prompt": PROMPT}),
    "a JSON list": json.dumps([PROMPT]),
    "what looks like kombu's bookkeeping": json.dumps([{"prompt": PROMPT}, "", ""]),
    "kombu's bookkeeping with a message in it": json.dumps([envelope(), "", QUEUE]),
    "a JSON null": "null",
    "properties without a tag": json.dumps({"body": PROMPT, "headers": {}, "properties": {}}),
    "delivery info without a queue": with_properties(delivery_info={}),
    "delivery info that is null": with_properties(delivery_info=None),
    "a tag that is no text": with_properties(delivery_tag={"a": 1}),
    "a body that claims to be base64": with_properties(body_encoding="base64"),
    "an encoding that nobody knows": with_properties(body_encoding="rot13"),
    "no task name": without_header("task"),
    "no headers": json.dumps(envelope() | {"headers": None}),
    "headers that are a list": json.dumps(envelope() | {"headers": [PROMPT]}),
    "an unknown task name": json.dumps(envelope(task="os.system")),
    "a task name that is a list": with_headers(task=["latentline.generate"]),
    "no message id": without_header("id"),
    "an ETA that is no time": with_headers(eta=PROMPT),
    "a time limit that is none": with_headers(timelimit=5),
    "retries that are no number": with_headers(retries="many"),
    "a body that is no JSON": with_body(f"not json: {PROMPT}"),
    "an empty body": with_body(""),
    "a body that is null": with_body("null"),
    "a body that is a number": with_body("5"),
    "a body that is an empty list": with_body("[]"),
    "a body that is no triple": with_body([[PROMPT]]),
    "a body that is an object": with_body({"prompt": PROMPT}),
    "a body whose arguments are no list": with_body([5, {}, ANNOTATIONS]),
    "a body of another content type": json.dumps(envelope() | {"content-type": "application/x-python-serialize", "body": "gASVAAAA"}),
    "no argument": with_body([[], {}, ANNOTATIONS]),
    "two arguments": with_body([["nobody", PROMPT], {}, ANNOTATIONS]),
    "an argument by an unknown name": with_body([[], {"prompt": PROMPT}, ANNOTATIONS]),
    "an argument that is null": with_body([[None], {}, ANNOTATIONS]),
    "an argument that is a list": with_body([[[PROMPT]], {}, ANNOTATIONS]),
    "an argument that is an object": with_body([[{"prompt": PROMPT}], {}, ANNOTATIONS]),
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_a_bad_message_becomes_a_dead_letter_and_the_worker_takes_the_next_job(
    bench: Bench, caplog: pytest.LogCaptureFixture, raw: str | bytes
) -> None:
    with caplog.at_level(logging.INFO), bench.run():
        bench.put(raw)
        good = bench.submit()
        assert bench.next_job() == good
        # The one thread takes a list's messages in order, but jobs and bad messages may lie in the lists of two priorities: only a
        # last job in the list of the bad message surely comes after it.
        bench.put(routing.wake_up(routing.GENERATE_TASK, (last := bench.submit()), QUEUE, 0, "last"))
        assert bench.next_job() == last
        bench.all_acknowledged()
    (letter,) = bench.letters()
    assert letter["kind"] == "message"
    assert letter["reason"]
    assert float(letter["at"]) > 0
    assert PROMPT not in caplog.text
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR)
    assert {records.run(bench.client, records.get(one)).status for one in (good, last)} == {Status.SUCCEEDED}


@pytest.mark.parametrize(
    ("raw", "reason", "kept"),
    [
        (f"prompt: {PROMPT}", "not a message of this system", f"prompt: {PROMPT}"),
        (json.dumps({"prompt": PROMPT}), "not a message of this system", json.dumps({"prompt": PROMPT})),
        (json.dumps(envelope(task="os.system")), "unknown task 'os.system'", envelope(task="os.system")["body"]),
        (with_body("no json"), "", "no json"),
    ],
    ids=["text", "JSON", "unknown task", "body"],
)
def test_the_letter_names_the_cause_and_keeps_the_message(bench: Bench, raw: str, reason: str, kept: str) -> None:
    with bench.run():
        bench.put(raw)
        good = bench.submit()
        assert bench.next_job() == good
        bench.all_acknowledged()
    (letter,) = bench.letters()
    assert reason in letter["reason"]
    assert kept in letter["message"]


def test_a_wake_up_for_an_unknown_job_is_kept_under_its_id(bench: Bench) -> None:
    with bench.run():
        bench.put(routing.wake_up(routing.GENERATE_TASK, "nobody", QUEUE, 0, "m1"))
        good = bench.submit()
        assert bench.next_job() == good
        bench.all_acknowledged()
    (letter,) = bench.letters()
    assert (letter["id"], letter["job_id"], letter["kind"]) == ("nobody", "nobody", "message")
    assert "no job 'nobody'" in letter["reason"]


def test_a_record_of_another_version_fails_and_is_kept_as_the_job_s_letter(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    strange = bench.submit()
    bench.client.hset(routing.job_key(strange), "request", json.dumps({"version": 2, "words": PROMPT}))
    with caplog.at_level(logging.INFO), bench.run():
        good = bench.submit()
        assert bench.next_job() == good
        bench.all_acknowledged()
    (letter,) = bench.letters()
    assert (letter["id"], letter["job_id"], letter["kind"], letter["code"]) == (strange, strange, "job", "unreadable_record")
    assert "cannot read" in letter["reason"]
    raw = bench.client.hgetall(routing.job_key(strange))
    assert (raw["status"], json.loads(raw["error"])["code"]) == ("failed", "unreadable_record")
    with pytest.raises(JobNotFound, match="cannot read"):
        records.run(bench.client, records.get(strange))
    assert PROMPT not in caplog.text


def test_many_bad_messages_in_a_row_hold_up_nobody(bench: Bench) -> None:
    with bench.run():
        for i in range(50):
            bench.put(f"garbage {i}")
        good = bench.submit()
        bench.put(routing.wake_up(routing.GENERATE_TASK, (last := bench.submit()), QUEUE, 0, "last"))
        assert {bench.next_job() for _ in range(2)} == {good, last}
        bench.all_acknowledged()
    assert {letter["message"] for letter in bench.letters()} == {f"garbage {i}" for i in range(50)}


def test_wake_ups_that_a_worker_holds_at_its_end_go_back_to_the_queue(bench: Bench) -> None:
    """The transport reads its own bookkeeping with the same function as the messages."""
    ids = [bench.submit() for _ in range(3)]
    before = waiting(bench.client)
    with bench.app.connection_for_read() as connection:
        taken: list[Any] = []
        with connection.Consumer(bench.app.conf.task_queues, on_message=taken.append) as consumer:
            consumer.qos(prefetch_count=10)
            while len(taken) < len(ids):
                connection.drain_events(timeout=PATIENCE_S)
        assert waiting(bench.client) == []
    # Nothing was acknowledged: closing the connection has put everything back, where another worker can read it.
    assert sorted(waiting(bench.client)) == sorted(before)
    assert bench.client.hlen(routing.GENERATE_UNACKED) == 0
    with bench.run():
        assert {bench.next_job() for _ in ids} == set(ids)
        bench.all_acknowledged()
    assert bench.letters() == []


def waiting(client: redis.Redis) -> list[str]:
    lists = [routing.queue_list(name, priority) for name in routing.queue_names(MODEL.id) for priority in routing.PRIORITY_STEPS]
    return [json.loads(json.loads(raw)["body"])[0][0] for key in lists for raw in client.lrange(key, 0, -1)]
