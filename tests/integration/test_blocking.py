"""A real worker on a real broker waits for messages in one long call, and in short ones only while a shard is at its limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis
from celery import Celery
from support.jobs import PATIENCE_S, celery_app, run_worker, submit

from latentline.routing import GENERATE_TASK, GENERATE_UNACKED, queue_names
from latentline.testing import MODEL
from latentline_worker.transport.blocking import IDLE_S, MAX_CAPPED_S

CAP = 3
NUM_LISTS = 4 * len(queue_names(MODEL.id))


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    return empty_valkey


@pytest.fixture
def app(valkey_url: str) -> Iterator[Celery]:
    with celery_app(valkey_url, queue_names(MODEL.id), max_per_queue=CAP) as app:
        yield app


class Watched:
    """The commands that reach the broker."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=PATIENCE_S)
        self._monitor = self._client.monitor()

    def __enter__(self) -> Watched:
        self._monitor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._monitor.__exit__(*error)
        self._client.close()

    def next(self, *names: str) -> list[str]:
        """The next command of one of these names, in words."""
        while True:
            words: list[str] = self._monitor.next_command()["command"].split()
            if words[0].upper() in names:
                return words


def test_an_idle_worker_waits_in_one_call_that_a_message_ends(client: redis.Redis, app: Celery, valkey_url: str) -> None:
    taken = threading.Event()

    def generate(job_id: str) -> None:
        taken.set()

    app.task(generate, name=GENERATE_TASK, shared=False)
    with Watched(valkey_url) as broker, run_worker(app, concurrency=2 * CAP):
        for _ in range(2):
            call = broker.next("BRPOP")
            assert len(call) == 1 + NUM_LISTS + 1 and float(call[-1]) == IDLE_S
        submit(client, 1)
        while "latentline.unacked" not in " ".join(call := broker.next("BRPOP", "HSET")):
            assert call[0] != "BRPOP", "the call that waited brought the message"
        assert taken.wait(PATIENCE_S)


def test_a_shard_at_its_limit_is_left_out_of_short_calls_and_filled_again(client: redis.Redis, app: Celery, valkey_url: str) -> None:
    ended, started = threading.Semaphore(0), threading.Semaphore(0)
    running, most = 0, 0
    lock = threading.Lock()

    def generate(job_id: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        started.release()
        ended.acquire(timeout=PATIENCE_S)
        with lock:
            running -= 1

    app.task(generate, name=GENERATE_TASK, shared=False)
    jobs = submit(client, 4 * CAP)
    with Watched(valkey_url) as broker, run_worker(app, concurrency=2 * CAP):
        for _ in range(CAP):
            assert started.acquire(timeout=PATIENCE_S)
        while len(call := broker.next("BRPOP")) == 1 + NUM_LISTS + 1:
            pass
        assert len(call) == 1 + NUM_LISTS - 4 + 1 and float(call[-1]) == MAX_CAPPED_S, "four lists of one shard are left out"
        for _ in jobs[CAP:]:
            ended.release()
            assert started.acquire(timeout=PATIENCE_S), "the place of a job that ended is filled"
        for _ in range(CAP):
            ended.release()
        while len(broker.next("BRPOP")) != 1 + NUM_LISTS + 1:
            pass  # no shard is at its limit any more
    assert most == CAP
    assert client.hlen(GENERATE_UNACKED) == 0


def test_another_tenant_is_served_while_a_shard_is_at_its_limit(client: redis.Redis, app: Celery) -> None:
    ended, started = threading.Event(), threading.Semaphore(0)
    heard: list[str] = []

    def generate(job_id: str) -> None:
        heard.append(job_id)
        started.release()
        ended.wait(PATIENCE_S)

    app.task(generate, name=GENERATE_TASK, shared=False)
    busy = submit(client, 2 * CAP, tenant="busy")
    with run_worker(app, concurrency=2 * CAP):
        for _ in range(CAP):
            assert started.acquire(timeout=PATIENCE_S)
        (quiet,) = submit(client, 1, tenant="quiet")
        assert started.acquire(timeout=PATIENCE_S)
        assert heard == [*busy[:CAP], quiet]
        ended.set()
        for _ in range(CAP):
            assert started.acquire(timeout=PATIENCE_S)
