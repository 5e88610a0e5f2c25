"""A worker is killed in the middle of a job; another one finishes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from latentline import Client
from latentline.errors import LatentlineError, MissingExtra
from latentline.jobs import Phase, Status
from latentline.settings import Settings
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.process import Child, clean_env
from latentline_worker.embedded.store import Store


def worker(folder: Path, name: str, env: dict[str, str]) -> Child:
    return Child(name, [sys.executable, "-m", "latentline_worker.launch"], folder / f"{name}.log", clean_env(**env))


def test_kill_9_in_the_middle_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, store = Broker(tmp_path / "b", "secret"), Store(tmp_path / "s", "k" * 20, "s" * 40)
    children: list[Child] = []
    try:
        broker.start()
        store.start()
        env = {"LATENTLINE_REDIS_URL": broker.url, **store.environment, "LATENTLINE_LEASE_S": "2"}
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        with Client(Settings()) as client:

            def serves() -> bool:
                try:
                    return bool(client.models())
                except LatentlineError:
                    return False

            children.append(worker(tmp_path, "first", env))
            children[0].wait_until(serves, 120)
            job = client.submit(prompt="a cat", num_inference_steps=150, num_images=8, seed=1)
            for event in client.events(job.id):
                if event.data.get("phase") == Phase.DENOISING and event.data.get("step", 0) > 2:
                    break
            children[0].process.kill()
            children.append(worker(tmp_path, "second", env))
            done = client.wait(job.id, timeout_s=200)
            assert (done.status, done.attempt, len(done.images)) == (Status.SUCCEEDED, 2, 8), children[1].tail()
            kinds = [event.type for event in client.events(job.id)]
            assert [kind for kind in kinds if kind != "job.progress"] == [
                "job.queued",
                "job.running",
                "job.queued",
                "job.running",
                "job.succeeded",
            ]
    except MissingExtra as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    finally:
        for child in reversed(children):
            child.stop()
        store.stop()
        broker.stop()
