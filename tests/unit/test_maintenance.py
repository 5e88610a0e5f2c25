"""Maintenance services: each does its one duty, goes on after a failure, and stops when told."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest

from latentline import records, routing
from latentline.errors import BrokerUnavailable
from latentline.jobs import JobRequest, resolve
from latentline.records import Records
from latentline.records.maintenance import MAX_EXPIRE
from latentline_worker.maintenance.callback_wakes import CallbackWakes
from latentline_worker.maintenance.expiry import Expiry
from latentline_worker.maintenance.liveness import LivenessFile
from latentline_worker.maintenance.service import Service

PATIENCE_S = 60  # how long a test waits for a signal before it fails; no test measures time


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


def submit(client: fakeredis.FakeRedis, **fields: Any) -> str:
    return records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat", **fields}))], 600))[0].id


class Counting(Service):
    """Fails as told, then works."""

    def __init__(self, *problems: Exception) -> None:
        super().__init__("counting", 0.001)
        self.problems = list(problems)
        self.num_turns = 0
        self.worked = threading.Event()

    def run_once(self) -> None:
        self.num_turns += 1
        if self.problems:
            raise self.problems.pop(0)
        self.worked.set()


def test_a_service_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    service = Counting(BrokerUnavailable("away"), ValueError("unexpected"))
    with caplog.at_level(logging.WARNING):
        service.start()
        assert service.worked.wait(PATIENCE_S)
        service.stop(PATIENCE_S)
    away, unexpected = caplog.records[:2]
    assert (away.getMessage(), away.exc_info) == ("counting: away", None)
    assert unexpected.getMessage() == "counting failed" and unexpected.exc_info is not None


def test_a_service_that_was_stopped_has_no_further_turn() -> None:
    service = Counting()
    service.start()
    assert service.worked.wait(PATIENCE_S)
    service.stop(PATIENCE_S)
    turns = service.num_turns
    assert not service._thread.is_alive() and service.stopped
    threading.Event().wait(0.05)
    assert service.num_turns == turns


class FakeStore:
    """Deletes nothing, says that it did or did not, and may hang."""

    def __init__(self, works: bool = True, hang: threading.Event | None = None) -> None:
        self.works, self.hang = works, hang
        self.asked: list[str] = []
        self.entered = threading.Event()

    def delete_all(self, prefix: str) -> bool:
        self.asked.append(prefix)
        self.entered.set()
        if self.hang:
            self.hang.wait(PATIENCE_S)
        return self.works


def expiry_of(client: fakeredis.FakeRedis, store: FakeStore) -> Expiry:
    return Expiry(Records(client), "cpu@test", cast(Any, store))


def expired(client: fakeredis.FakeRedis) -> str:
    """The member of a job whose retention is over."""
    job_id = submit(client)
    records.run(client, records.cancel(job_id, 600))
    client.zadd(routing.expiring_key(), {f"default/{job_id}": 1})
    return f"default/{job_id}"


def test_images_go_with_their_record(client: fakeredis.FakeRedis) -> None:
    member, store = expired(client), FakeStore()
    expiry_of(client, store).run_once()
    assert store.asked == [f"{member}/"]
    assert not client.exists(routing.expiring_key()) and not client.exists(routing.job_key(member.split("/")[1]))


def test_what_cannot_be_deleted_comes_again_later_and_delays_nothing_else(client: fakeredis.FakeRedis) -> None:
    first, store = expired(client), FakeStore(works=False)
    expiry = expiry_of(client, store)
    expiry.do_turn()
    second = expired(client)
    store.works = True
    expiry.do_turn()
    assert store.asked == [f"{first}/", f"{second}/"], "not at once again"
    assert client.zrange(routing.expiring_key(), 0, -1) == [first]


def test_stopping_does_not_wait_for_a_store_that_hangs_and_no_further_deletion_begins(
    client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired(client), expired(client)
    hang = threading.Event()
    store = FakeStore(hang=hang)
    expiry = expiry_of(client, store)
    monkeypatch.setattr(expiry, "_every_s", 0.001)
    expiry.start()
    assert store.entered.wait(PATIENCE_S)
    expiry.stop()  # returns although a deletion is under way
    hang.set()
    expiry.stop(PATIENCE_S)
    assert len(store.asked) == 1


def test_many_expired_jobs_go_in_one_turn_although_one_call_lists_few(client: fakeredis.FakeRedis) -> None:
    members = {expired(client) for _ in range(MAX_EXPIRE + 1)}
    store = FakeStore()
    expiry_of(client, store).run_once()
    assert {asked.rstrip("/") for asked in store.asked} == members
    assert not client.exists(routing.expiring_key())


def test_due_callbacks_are_woken(client: fakeredis.FakeRedis) -> None:
    store = Records(client)
    job_id = submit(client, callback={"url": "http://receiver.example/"})
    records.run(client, records.cancel(job_id, 600))
    client.delete(routing.CALLBACK_QUEUE)
    client.zadd(routing.due_callbacks_key(), {f"msg_{job_id}_cancelled": 1})
    CallbackWakes(store, "callbacks@test").run_once()
    assert client.llen(routing.CALLBACK_QUEUE) == 1


def test_the_liveness_file_is_touched_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    liveness = LivenessFile(path)
    liveness.remove()  # nothing there yet
    liveness.run_once()
    assert path.exists()
    liveness.remove()
    assert not path.exists()


def test_without_a_path_there_is_no_liveness_file() -> None:
    liveness = LivenessFile(None)
    liveness.touch()
    liveness.remove()


def test_a_liveness_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    liveness = LivenessFile(tmp_path / "no such folder" / "ready")
    liveness.touch()
    (tmp_path / "a file").touch()
    LivenessFile(tmp_path / "a file" / "ready").remove()
