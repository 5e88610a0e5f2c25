"""The wake-up that producers write without Celery is one that a real Celery worker takes, in order of priority."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from support.jobs import PATIENCE_S, celery_app, run_worker

from latentline import records
from latentline.jobs import JobRequest, Status, resolve
from latentline.records import Records
from latentline.routing import GENERATE_TASK, GENERATE_UNACKED, queue_list, queue_name, queue_names
from latentline.testing import MODEL, FakeImages, FakeWorker


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    return empty_valkey


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    with celery_app(valkey_url, queue_names(MODEL.id), max_per_queue=16) as app:
        yield app


def submit(client: redis.Redis, *priorities: int, **fields: Any) -> list[str]:
    requests = [JobRequest.parse({"prompt": "a cat", "num_inference_steps": 2, "priority": p, **fields}) for p in priorities]
    return [record.id for record in records.run(client, records.submit([resolve(one) for one in requests], 600))]


def test_wake_ups_of_every_priority_run_once_and_in_order(client: redis.Redis, app: Celery) -> None:
    priorities = list(range(9, -1, -1))
    ids = submit(client, *priorities)
    taken: list[str] = []
    all_taken = threading.Event()

    def generate(job_id: str) -> None:
        taken.append(job_id)
        if len(taken) >= len(ids):
            all_taken.set()

    app.task(generate, name=GENERATE_TASK, shared=False)
    with run_worker(app, "solo"):
        assert all_taken.wait(PATIENCE_S)
    # kombu keeps four lists; within one it is first come, first served.
    steps = {9: 3, **dict.fromkeys((6, 7, 8), 2), **dict.fromkeys((3, 4, 5), 1), **dict.fromkeys((0, 1, 2), 0)}
    expected = [job_id for _, job_id in sorted(zip(priorities, ids, strict=True), key=lambda pair: steps[pair[0]])]
    assert taken == expected
    assert not any(client.exists(queue_list(name, p)) for name in queue_names(MODEL.id) for p in range(10))
    assert client.hlen(GENERATE_UNACKED) == 0


def test_from_submission_to_a_settled_record_through_celery(client: redis.Redis, app: Celery) -> None:
    worker = FakeWorker(client, FakeImages())
    (job_id,) = submit(client, 5)

    def generate(job_id: str) -> None:
        worker.run(job_id)

    app.task(generate, name=GENERATE_TASK, shared=False)
    with run_worker(app):
        last = None
        while last is None or not last.terminal:
            new = records.run(client, records.events(job_id, last.id if last else None, 1000))
            last = new[-1] if new else last
    record = records.run(client, records.get(job_id))
    assert (record.status, record.worker, record.attempt) == (Status.SUCCEEDED, worker.name, 1)


def test_a_released_job_is_taken_again_before_those_that_wait(client: redis.Redis, app: Celery) -> None:
    store = Records(client)
    first, second = submit(client, 5, 5)
    claim = store.claim(first, "leaving", 30)
    client.delete(queue_list(queue_name(MODEL.id), 5))  # the wake-ups of both jobs are lost; the released job gets a new one
    assert claim is not None and store.release(first, claim.token)
    taken: list[str] = []
    heard = threading.Event()

    def generate(job_id: str) -> None:
        taken.append(job_id)
        heard.set()

    app.task(generate, name=GENERATE_TASK, shared=False)
    with run_worker(app, "solo"):
        assert heard.wait(PATIENCE_S)
    assert taken == [first] and records.run(client, records.get(second)).status is Status.QUEUED
