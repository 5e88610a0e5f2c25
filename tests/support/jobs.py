"""Submitting jobs and running real Celery workers, for tests that watch the traffic between them and the broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker

from latentline import records
from latentline.connection import connect
from latentline.errors import LatentlineError
from latentline.jobs import JobRecord, JobRequest, resolve
from latentline.records import Records
from latentline.routing import GENERATE_UNACKED
from latentline.settings import Settings
from latentline_worker.transport.app import create_app

PATIENCE_S = 60  # how long a test waits for a signal before it fails; no test measures time
SIDE = 64  # px, the bundled model's own size


def accepted(outcomes: Sequence[JobRecord | LatentlineError]) -> list[JobRecord]:
    """The records of submissions; raises the error of the first that was refused."""
    for outcome in outcomes:
        if isinstance(outcome, LatentlineError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, JobRecord)]


def submit(client: redis.Redis, count: int = 1, **fields: Any) -> list[str]:
    requests = [JobRequest.parse({"prompt": "a cat", "num_inference_steps": 2, "seed": i, **fields}) for i in range(count)]
    return [record.id for record in accepted(records.run(client, records.submit([resolve(one) for one in requests], 600)))]


@contextlib.contextmanager
def celery_app(url: str, queues: list[str], unacked: str = GENERATE_UNACKED, max_per_queue: int = 4) -> Iterator[Celery]:
    """The application of a worker or deliverer, with its real delivery policy."""
    client = connect(url)
    app = create_app(Settings.model_validate({"redis_url": url}), queues, Records(client), max_per_queue, unacked)
    yield app
    app.close()
    client.close()


def run_worker(app: Celery, pool: str = "threads", concurrency: int = 1, **options: Any) -> Any:
    # No ping task: it would need a result backend, which this application has not.
    return start_worker(app, pool=pool, concurrency=concurrency, perform_ping_check=False, shutdown_timeout=PATIENCE_S, **options)


def until(true: Callable[[], Any]) -> Any:
    """What ``true`` gives, as soon as that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value
