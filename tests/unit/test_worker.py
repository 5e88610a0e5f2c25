"""The worker process: the order in which its parts start and stop, and what its announcement tells the fleet."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest
from support.families import OddFamily
from support.stubs import FAMILY, MemoryStore, StubEngine

from latentline import records, routing
from latentline.errors import BrokerUnavailable
from latentline.jobs import LEVEL
from latentline.models import Working
from latentline.records import Records
from latentline.records.fleet import WORKER_ALIVE_S
from latentline.testing import MODEL
from latentline_worker.generate.announcer import HEARTBEAT_S, Announcer
from latentline_worker.generate.roster import Roster
from latentline_worker.generate.worker import GenerateWorker
from latentline_worker.maintenance.service import JITTER
from latentline_worker.settings import WorkerSettings

NAME = "cpu@test"
ROSTER = Roster.of([FAMILY])


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


def make_worker(client: fakeredis.FakeRedis, engine: StubEngine, **settings: Any) -> GenerateWorker:
    return GenerateWorker(
        NAME, WorkerSettings(**settings), Roster.of([FAMILY]), cast(Any, engine), Records(client), cast(Any, MemoryStore())
    )


def test_a_worker_is_announced_from_start_to_stop(client: fakeredis.FakeRedis, caplog: pytest.LogCaptureFixture) -> None:
    worker = make_worker(client, StubEngine())
    with caplog.at_level(logging.INFO):
        worker.start()
    assert records.run(client, records.workers()) == [NAME] and MODEL.id in records.run(client, records.models())
    assert caplog.messages[-1] == f"{NAME}: ready"
    worker.stop()
    assert records.run(client, records.workers()) == []


def test_everything_stops_in_the_order_of_the_data(client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine()
    worker = make_worker(client, engine)
    order: list[str] = []

    def note(part: Any, name: str) -> None:
        stop = part.stop
        monkeypatch.setattr(part, "stop", lambda *args: (order.append(name), stop(*args)))

    for part, name in ((engine, "engine"), (worker._leases, "leases"), (worker._announcer, "announcer")):
        note(part, name)
    worker.start()
    worker.stop()
    assert order == ["engine", "leases", "announcer"]
    threads = (worker._leases._thread, worker._announcer._thread)
    assert not any(thread.is_alive() for thread in threads), "nothing beats or announces after the worker is gone"


def test_the_maintenance_services_run_from_start_to_stop(client: fakeredis.FakeRedis) -> None:
    worker = make_worker(client, StubEngine())
    services = (worker._watchdog, worker._upkeep, worker._expiry, worker._announcer)
    worker.start()
    assert all(service._thread.is_alive() for service in services)
    worker.stop()
    assert all(service.stopped for service in services)


def test_a_failed_announcement_keeps_nothing_else_from_starting(
    client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Celery logs what its signal handlers raise and goes on: the worker would claim jobs whose leases nobody renews."""
    worker = make_worker(client, StubEngine())
    running: list[bool] = []

    def announce() -> None:
        running.append(worker._leases._thread.is_alive() and worker._watchdog._thread.is_alive())
        raise RuntimeError("unexpected")

    monkeypatch.setattr(worker._announcer, "run_once", announce)
    worker.start()
    services = (worker._leases, worker._watchdog, worker._upkeep, worker._expiry, worker._announcer)
    assert all(service._thread.is_alive() for service in services)
    assert running[0] is True, "leases and the watchdog come first"
    assert "announcer failed" in caplog.messages
    monkeypatch.undo()
    worker.stop()


def test_the_liveness_file_goes_with_the_worker(client: fakeredis.FakeRedis, tmp_path: Path) -> None:
    path = tmp_path / "ready"
    worker = make_worker(client, StubEngine(), ready_file=path)
    path.touch()
    worker.stop()
    assert not path.exists()


@pytest.mark.parametrize(("stalled_s", "stalled"), [(0.0, False), (5.0, False), (5.1, True), (float("inf"), True)])
def test_an_engine_is_stalled_after_stall_s(client: fakeredis.FakeRedis, stalled_s: float, stalled: bool) -> None:
    engine = StubEngine()
    engine.stalled_s = stalled_s
    assert make_worker(client, engine, stall_s=5).engine_stalled() is stalled


def test_abort_removes_the_liveness_file_and_ends_with_status_70(
    client: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ready"
    worker = make_worker(client, StubEngine(), ready_file=path)
    path.touch()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    worker.abort()
    assert codes == [os.EX_SOFTWARE] == [70] and not path.exists()


@pytest.mark.parametrize(("stalled_s", "told"), [(130.4, "finished nothing for 130 s"), (float("inf"), "the engine has failed")])
def test_abort_says_whether_the_engine_hangs_or_has_failed(
    client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stalled_s: float, told: str
) -> None:
    engine = StubEngine()
    engine.stalled_s = stalled_s
    monkeypatch.setattr(os, "_exit", lambda _: None)
    make_worker(client, engine).abort()
    assert told in caplog.text and "inf" not in caplog.text


def test_the_process_ends_after_the_drain_also_when_jobs_cannot_be_given_back(
    client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    def fail() -> None:
        raise RuntimeError("broken")

    codes: list[int] = []
    worker = make_worker(client, StubEngine())
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(worker._leases, "release_all", fail)
    with pytest.raises(Ended):
        worker._end_now()
    assert codes == [0]


class Away:
    def announce(self, *_: object) -> None:
        raise BrokerUnavailable("away")

    worker_gone = announce


def test_a_broker_that_is_away_neither_stops_the_announcer_nor_fails_its_end() -> None:
    announcer = Announcer(cast(Any, Away()), NAME, ROSTER, Working)
    announcer.start()
    announcer.stop()


class Told:
    """Records that note what an announcer tells the broker."""

    def __init__(self, client: fakeredis.FakeRedis) -> None:
        self._records = Records(client)
        self.calls: list[str] = []

    def announce(self, worker: str, *said: Any) -> None:
        self.calls.append("announce")
        self._records.announce(worker, *said)

    def heartbeat(self, worker: str, *asked: Any) -> Any:
        self.calls.append("heartbeat")
        return self._records.heartbeat(worker, *asked)


def test_a_worker_announces_itself_once_and_then_sends_heartbeats(client: fakeredis.FakeRedis) -> None:
    Records(client).announce(NAME, [MODEL.model_copy(update={"max_pixels": 4096})])  # by the process before, under the same name
    told = Told(client)
    announcer = Announcer(cast(Any, told), NAME, ROSTER, Working)
    for _ in range(3):
        announcer.run_once()
    assert told.calls == ["announce", "heartbeat", "heartbeat"]
    assert records.run(client, records.models()) == {MODEL.id: MODEL}


def test_a_heartbeat_keeps_worker_and_announcement_alive(client: fakeredis.FakeRedis) -> None:
    announcer = Announcer(Records(client), NAME, ROSTER, Working)
    announcer.run_once()
    for key in (routing.workers_key(), routing.announced_at_key()):
        client.zincrby(key, -50, NAME)
    announcer.run_once()
    assert records.run(client, records.workers()) == [NAME]
    assert client.time()[0] - client.zscore(routing.announced_at_key(), NAME) < 40


@pytest.mark.parametrize("lost", [None, routing.announced_key(), routing.announced_at_key()])
def test_a_broker_that_lost_the_announcement_is_told_again(client: fakeredis.FakeRedis, lost: str | None) -> None:
    told = Told(client)
    announcer = Announcer(cast(Any, told), NAME, ROSTER, Working)
    announcer.run_once()
    if lost:
        client.delete(lost)
    else:
        client.flushall()
    announcer.run_once()
    assert records.run(client, records.workers()) == [NAME] and set(records.run(client, records.models())) == {MODEL.id}


def test_three_heartbeats_fit_into_the_time_in_which_a_worker_counts_as_alive() -> None:
    assert 3 * HEARTBEAT_S * (1 + JITTER) < WORKER_ALIVE_S


def test_a_worker_of_several_models_announces_all_of_them_and_reads_their_queues(client: fakeredis.FakeRedis) -> None:
    other = OddFamily("other/one")
    roster = Roster.of([FAMILY, other])
    worker = GenerateWorker(NAME, WorkerSettings(), roster, cast(Any, StubEngine()), Records(client), cast(Any, MemoryStore()))
    worker.start()
    worker.stop()
    assert records.run(client, records.models()) == {MODEL.id: FAMILY.info, "other/one": other.info}
    queues = {queue.name for queue in worker._app().conf.task_queues}
    assert queues == {*routing.queue_names(MODEL.id, LEVEL), *routing.queue_names("other/one", LEVEL)}
