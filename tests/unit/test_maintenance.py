"""Maintenance services: each does its one duty, goes on after a failure, and stops when told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest

from latentline import records, routing
from latentline.errors import BrokerUnavailable
from latentline.jobs import JobRequest, Status, resolve
from latentline.records import Records
from latentline.testing import MODEL
from latentline_worker.maintenance import reaper as reaper_module
from latentline_worker.maintenance.callback_wakes import CallbackWakes
from latentline_worker.maintenance.deadlines import Deadlines
from latentline_worker.maintenance.expiry import Expiry
from latentline_worker.maintenance.liveness import LivenessFile
from latentline_worker.maintenance.reaper import Reaper
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
    return Expiry(Records(client), cast(Any, store))


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
    expiry.run_once()
    second = expired(client)
    store.works = True
    expiry.run_once()
    assert store.asked == [f"{first}/", f"{second}/"], "not at once again"
    assert client.zrange(routing.expiring_key(), 0, -1) == [first]


def test_stopping_does_not_wait_for_a_store_that_hangs_and_no_further_deletion_begins(client: fakeredis.FakeRedis) -> None:
    expired(client), expired(client)
    hang = threading.Event()
    store = FakeStore(hang=hang)
    expiry = expiry_of(client, store)
    expiry.start()
    assert store.entered.wait(PATIENCE_S)
    expiry.stop()  # returns although a deletion is under way
    hang.set()
    expiry.stop(PATIENCE_S)
    assert len(store.asked) == 1


class Broker:
    """The records as the reaper uses them; ``away`` makes every call fail."""

    def __init__(self, up_s: float = 3600.0) -> None:
        self.seconds, self.away = up_s, False
        self.calls: list[str] = []

    def up_s(self) -> float:
        if self.away:
            raise BrokerUnavailable("away")
        return self.seconds

    def reclaim(self) -> list[str]:
        self.calls.append("reclaim")
        return ["job-1"]

    def wake(self, model: str, grace_s: float) -> list[str]:
        self.calls.append(f"wake {model} {grace_s:g}")
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the reaper's clock."""
    now = [1000.0]
    monkeypatch.setattr(reaper_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_reaper_takes_lost_jobs_back_and_wakes_waiting_ones(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    with caplog.at_level(logging.WARNING):
        Reaper(cast(Any, broker), "m", 30).run_once()
    assert broker.calls == ["reclaim", "wake m 30"]
    assert "job job-1: its worker is lost" in caplog.text


def test_nothing_is_reclaimed_while_the_broker_has_been_up_for_less_than_a_lease() -> None:
    broker = Broker(up_s=29)
    reaper = Reaper(cast(Any, broker), "m", 30)
    reaper.run_once()
    assert broker.calls == ["wake m 30"]
    broker.seconds = 31
    reaper.run_once()
    assert "reclaim" in broker.calls


def assert_it_pauses_for_one_lease(reaper: Reaper, broker: Broker, clock: Callable[[float], None]) -> None:
    clock(29)
    reaper.run_once()
    assert broker.calls == []
    clock(2)
    reaper.run_once()
    assert broker.calls == ["reclaim", "wake m 30"]


def test_after_an_outage_that_the_reaper_saw_nothing_is_done_for_one_lease(clock: Callable[[float], None]) -> None:
    broker = Broker()
    reaper = Reaper(cast(Any, broker), "m", 30)
    broker.away = True
    with pytest.raises(BrokerUnavailable):
        reaper.run_once()
    broker.away = False
    assert_it_pauses_for_one_lease(reaper, broker, clock)


def test_after_an_outage_that_the_heartbeat_saw_nothing_is_done_for_one_lease(clock: Callable[[float], None]) -> None:
    broker = Broker()
    reaper = Reaper(cast(Any, broker), "m", 30)
    reaper.broker_lost()
    assert_it_pauses_for_one_lease(reaper, broker, clock)


def test_a_job_of_a_lost_worker_is_queued_again_on_real_records(client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Records(client)
    job_id = submit(client)
    assert store.claim(job_id, "lost@test", 30) is not None
    client.hset(routing.job_key(job_id), "lease_until", 1)
    client.zadd(routing.leases_key(), {job_id: 1})
    monkeypatch.setattr(store, "up_s", lambda: 3600.0)
    Reaper(store, MODEL.id, 30).run_once()
    assert records.run(client, records.get(job_id)).status is Status.QUEUED


def test_an_overdue_job_that_waits_is_ended_although_no_worker_takes_it(client: fakeredis.FakeRedis) -> None:
    overdue, in_time, running = submit(client, deadline_s=1000), submit(client, deadline_s=1000), submit(client, deadline_s=1000)
    store = Records(client)
    assert store.claim(running, "busy@test", 30) is not None
    for job_id in (overdue, running):
        client.hset(routing.job_key(job_id), "deadline_at", 1)
        client.zadd(routing.deadlines_key(), {job_id: 1})
    Deadlines(store).run_once()
    error = records.run(client, records.get(overdue)).error
    assert error is not None and error.code == "deadline_exceeded"
    assert [event.type for event in records.run(client, records.events(overdue))][-1] == "job.failed"
    assert records.run(client, records.get(in_time)).status is Status.QUEUED
    assert records.run(client, records.get(running)).status is Status.RUNNING, "its worker hears of it with its next beat"


def test_due_callbacks_are_woken(client: fakeredis.FakeRedis) -> None:
    store = Records(client)
    job_id = submit(client, callback={"url": "http://receiver.example/"})
    records.run(client, records.cancel(job_id, 600))
    client.delete(routing.CALLBACK_QUEUE)
    client.zadd(routing.due_callbacks_key(), {f"msg_{job_id}_cancelled": 1})
    CallbackWakes(store).run_once()
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
