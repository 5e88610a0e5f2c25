"""The heartbeat when the engine, and not the broker, is what fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest

from latentline import records
from latentline.connection import connect
from latentline.errors import BrokerUnavailable
from latentline.jobs import JobRequest, Phase
from latentline.records import Records
from latentline_worker.generate.leases import Heartbeat

PATIENCE_S = 20  # how long a test waits for a signal before it fails; no test measures time


class Stalled:
    """A heartbeat over an engine that has stalled for as long as it says."""

    def __init__(self, store: Records) -> None:
        self.store, self.seconds = store, 0.0
        self.given_up, self.beaten, self.tended, self.announced = (threading.Event() for _ in range(4))
        self.heart = Heartbeat(
            store,
            lease_s=30,
            tend=self.tended.set,
            announce=self.announced.set,
            stalled_for=lambda: self.seconds,
            stall_s=5,
            give_up=self.given_up.set,
            pulse=self.beaten.set,
        )


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


@pytest.fixture
def stalled(client: fakeredis.FakeRedis) -> Stalled:
    return Stalled(Records(client))


def claim(client: fakeredis.FakeRedis) -> Any:
    job = records.run(client, records.submit([JobRequest.parse({"prompt": "a cat"})], 600))[0]
    return Records(client).claim(job.id, "w", 30)


def beats(stalled: Stalled, wanted: Callable[[], bool]) -> None:
    stalled.heart.start()
    try:
        for _ in range(PATIENCE_S * 100):
            if wanted():
                return
            threading.Event().wait(0.01)
        pytest.fail("it never came")
    finally:
        stalled.heart.stop()


def test_an_engine_that_goes_on_keeps_its_process(stalled: Stalled) -> None:
    stalled.seconds = 4
    beats(stalled, lambda: stalled.beaten.is_set() and stalled.tended.is_set())
    assert not stalled.given_up.is_set()


@pytest.mark.parametrize("seconds", [6.0, float("inf")])
def test_a_wedged_engine_loses_its_leases_and_then_its_process(client: fakeredis.FakeRedis, stalled: Stalled, seconds: float) -> None:
    tracked = stalled.heart.track(claim(client))
    before = client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until")
    stalled.seconds = seconds
    beats(stalled, stalled.given_up.is_set)
    assert client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until") == before, "not renewed"


def test_what_only_uploads_may_end_first(client: fakeredis.FakeRedis, stalled: Stalled) -> None:
    tracked = stalled.heart.track(claim(client))
    tracked.uploading = True
    before = client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until")
    stalled.seconds = 6

    def renewed() -> bool:
        return client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until") != before

    stalled.heart.start()
    for _ in range(PATIENCE_S * 100):
        if renewed():
            break
        threading.Event().wait(0.01)
    assert renewed() and not stalled.given_up.is_set()
    stalled.heart.forget(tracked)
    assert stalled.given_up.wait(PATIENCE_S)
    stalled.heart.stop()


def test_the_process_is_known_to_be_well_also_while_the_broker_is_away() -> None:
    stalled = Stalled(Records(connect("redis://127.0.0.1:9/0")))  # nobody listens
    client = fakeredis.FakeRedis(decode_responses=True)
    stalled.heart.track(claim(client))
    beats(stalled, stalled.beaten.is_set)
    assert not stalled.given_up.is_set() and not stalled.tended.is_set()


def test_after_an_outage_a_worker_says_at_once_that_it_is_there_and_reaps_only_a_lease_later(
    client: fakeredis.FakeRedis, stalled: Stalled
) -> None:
    stalled.heart.track(claim(client))
    failed = threading.Event()
    beat = stalled.store.beat

    def away(_: object) -> None:
        failed.set()
        raise BrokerUnavailable("away")

    stalled.store.beat = away  # type: ignore[method-assign,assignment]
    stalled.heart.start()
    assert failed.wait(PATIENCE_S)
    stalled.store.beat = beat  # type: ignore[method-assign]
    assert stalled.announced.wait(PATIENCE_S)
    threading.Event().wait(0.5)
    assert not stalled.tended.is_set()
    stalled.heart.stop()


def test_a_readiness_file_that_cannot_be_written_costs_no_lease(client: fakeredis.FakeRedis, stalled: Stalled) -> None:
    tracked = stalled.heart.track(claim(client))
    before = client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until")

    def refuse() -> None:
        raise PermissionError("read-only")

    stalled.heart._pulse = refuse
    beats(stalled, lambda: client.hget(f"latentline:job:{tracked.claim.record.id}", "lease_until") != before)


class Denoising:
    """What the heartbeat sees of a request in the engine: one checkpoint, and whether it was told to stop."""

    def __init__(self, data: bytes | None) -> None:
        self.step, self.num_steps, self.batch_jobs = 3, 20, 1
        self.phase, self.preview, self.work = Phase.DENOISING, None, None
        self.checkpoint = self
        self.taken = 0
        self.stopped: str | None = None
        self._data = data

    def to_bytes(self, _: None) -> bytes | None:
        self.taken += 1
        return self._data

    def cancel(self, reason: str) -> None:
        self.stopped = reason


@pytest.mark.parametrize("data", [None, b"state"], ids=["too large", "refused"])
def test_a_checkpoint_that_is_not_kept_is_not_sent_again(
    client: fakeredis.FakeRedis, stalled: Stalled, monkeypatch: pytest.MonkeyPatch, data: bytes | None
) -> None:
    monkeypatch.setattr(stalled.store, "checkpoint", lambda *_: False)
    tracked = stalled.heart.track(claim(client))
    tracked.attach(request := Denoising(data))  # type: ignore[arg-type]
    for _ in range(3):
        stalled.heart._beat()
    assert (request.taken, tracked.saved_step) == (1, 0)


def test_a_checkpoint_that_fails_keeps_no_other_job_from_hearing_its_end(
    client: fakeredis.FakeRedis, stalled: Stalled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> bool:
        raise BrokerUnavailable("away")

    monkeypatch.setattr(stalled.store, "checkpoint", away)
    jobs = [stalled.heart.track(claim(client)) for _ in range(6)]
    for tracked in jobs:
        tracked.attach(Denoising(b"state"))  # type: ignore[arg-type]
    for tracked in jobs[1:]:
        records.run(client, records.cancel(tracked.claim.record.id, 600))
    with pytest.raises(BrokerUnavailable):
        stalled.heart._beat()
    assert [tracked.stop_reason for tracked in jobs] == [None, *["cancel"] * 5]


def test_what_is_left_at_the_end_of_a_drain_is_given_back(client: fakeredis.FakeRedis, stalled: Stalled) -> None:
    tracked = stalled.heart.track(claim(client))
    stalled.heart.release_all()
    assert client.hget(f"latentline:job:{tracked.claim.record.id}", "status") == "queued"
    assert client.hget(f"latentline:job:{tracked.claim.record.id}", "crashes") == "0"
