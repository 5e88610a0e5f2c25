"""Turns at maintenance: one worker at a time, whoever it is, and nothing reclaimed before every worker could renew its leases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from support.jobs import submit

from latentline import records, routing
from latentline.errors import BrokerUnavailable
from latentline.jobs import Status
from latentline.models import Working
from latentline.records import MAX_OVERDUE, MAX_WAKE, Records
from latentline.testing import MODEL
from latentline_worker.maintenance import reaper as reaper_module
from latentline_worker.maintenance.deadlines import Deadlines
from latentline_worker.maintenance.reaper import MIN_GAP_S, Reaper
from latentline_worker.maintenance.service import JITTER
from latentline_worker.maintenance.turns import TRY_S, TURN_S
from latentline_worker.maintenance.upkeep import Upkeep

LEASE_S = 30.0


class Broker:
    """The records as upkeep uses them; ``away`` makes every call fail, ``broken`` those of one duty."""

    def __init__(self) -> None:
        self.up, self.steady, self.away = 3600.0, 3600.0, False
        self.broken: dict[str, Exception] = {}
        self.taken: set[str] = set()
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        if self.away:
            raise BrokerUnavailable("away")
        self.calls.append(name)
        if name in self.broken:
            raise self.broken[name]

    def take_turn(self, duties: str, worker: str, life_s: float) -> bool:
        if self.away:
            raise BrokerUnavailable("away")
        if duties in self.taken:
            return False
        self.taken.add(duties)
        return True

    def begin_turn(self, gap_s: float) -> float:
        self._call(f"begin {gap_s:g}")
        return self.steady

    def up_s(self) -> float:
        return self.up

    def end_overdue(self) -> list[str]:
        self._call("end_overdue")
        return []

    def reclaim(self) -> list[str]:
        self._call("reclaim")
        return ["job-1"]

    def wake(self, model: str, grace_s: float) -> list[str]:
        self._call(f"wake {model} {grace_s:g}")
        return []


ALL = ["end_overdue", "begin 10", "reclaim", "wake m 30"]
NOT_RECLAIMING = ["end_overdue", "begin 10", "wake m 30"]
PAUSED = ["end_overdue", "begin 10"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the clock of this process."""
    now = [1000.0]
    monkeypatch.setattr(reaper_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


class Process:
    """A worker process, as far as upkeep goes. Every turn finds the one before it over."""

    def __init__(self, broker: Broker, name: str = "cpu@test") -> None:
        self.broker = broker
        self.reaper = Reaper(cast(Any, broker), ["m"], LEASE_S)
        self.upkeep = Upkeep(cast(Any, broker), name, ["m"], self.reaper, Deadlines(cast(Any, broker)))

    def turn(self) -> list[str]:
        """Have a turn; what was called."""
        self.broker.calls.clear()
        self.broker.taken.clear()
        self.upkeep.run_once()
        return list(self.broker.calls)


def test_a_turn_ends_overdue_jobs_takes_lost_ones_back_and_wakes_waiting_ones(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Process(Broker()).turn() == ALL
    assert "job job-1: its worker is lost" in caplog.text


def test_a_worker_without_the_turn_does_nothing() -> None:
    broker = Broker()
    process = Process(broker)
    assert process.turn() == ALL
    broker.calls.clear()
    process.upkeep.run_once()
    assert broker.calls == []


def test_nothing_is_reclaimed_while_the_broker_has_been_up_for_less_than_a_lease() -> None:
    broker = Broker()
    broker.up = 29
    assert Process(broker).turn() == NOT_RECLAIMING
    broker.up = 31
    assert Process(broker).turn() == ALL


def test_nothing_is_reclaimed_before_turns_had_no_gap_for_one_lease_also_by_a_process_that_has_just_started() -> None:
    broker = Broker()
    broker.steady = 29
    assert Process(broker).turn() == NOT_RECLAIMING
    broker.steady = 31
    assert Process(broker).turn() == ALL


def assert_it_pauses_for_one_lease(process: Process, clock: Callable[[float], None]) -> None:
    clock(29)
    assert process.turn() == PAUSED
    clock(2)
    assert process.turn() == ALL


def test_after_an_outage_that_upkeep_saw_nothing_is_reclaimed_for_one_lease(clock: Callable[[float], None]) -> None:
    broker = Broker()
    process = Process(broker)
    broker.away = True
    with pytest.raises(BrokerUnavailable):
        process.turn()
    broker.away = False
    assert_it_pauses_for_one_lease(process, clock)


def test_after_an_outage_that_the_heartbeat_saw_nothing_is_reclaimed_for_one_lease(clock: Callable[[float], None]) -> None:
    process = Process(Broker())
    process.reaper.broker_lost()
    assert_it_pauses_for_one_lease(process, clock)


def test_an_outage_in_the_middle_of_a_turn_ends_the_reclaiming_at_once(clock: Callable[[float], None]) -> None:
    broker = Broker()
    process = Process(broker)
    broker.broken["end_overdue"] = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable):
        process.turn()
    assert broker.calls == PAUSED
    broker.broken.clear()
    assert_it_pauses_for_one_lease(process, clock)


def test_a_paused_worker_takes_no_turn_from_one_that_may_reclaim() -> None:
    broker = Broker()
    paused, other = Process(broker, "paused"), Process(broker, "other")
    paused.reaper.broker_lost()
    assert paused.turn() == PAUSED
    broker.calls.clear()
    other.upkeep.run_once()  # while the paused one's turn lasts
    assert broker.calls == ALL


def answered_with_an_error() -> BrokerUnavailable:
    """As latentline.records raises it when the broker answers with an error."""
    error = BrokerUnavailable("the broker does not answer as it should: OOM")
    error.__cause__ = redis.ResponseError("OOM")
    return error


@pytest.mark.parametrize("duty", ALL)
@pytest.mark.parametrize("error", [answered_with_an_error(), ValueError("unexpected")], ids=["error reply", "fault"])
def test_a_duty_that_fails_stops_none_of_the_others(duty: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker()
    broker.broken[duty] = error
    process = Process(broker)
    for _ in range(2):  # and none of the next turn's
        try:
            process.turn()
        except BrokerUnavailable as raised:
            assert raised is error
        else:
            assert "upkeep: a duty failed" in caplog.text
        assert broker.calls == [call for call in ALL if (duty, call) != ("begin 10", "reclaim")]


def test_tries_are_spread_and_a_worker_that_is_alone_gets_every_turn() -> None:
    process = Process(Broker())
    assert (process.upkeep._every_s, process.upkeep._jitter) == (TRY_S, JITTER) and JITTER > 0
    assert TURN_S < TRY_S * (1 - JITTER), "the turn before has expired when the same worker tries again"
    assert TURN_S + TRY_S * (1 + JITTER) < 2, "overdue jobs end within two seconds also when the worker with the turn is killed"
    assert TRY_S * (1 + JITTER) < MIN_GAP_S


def test_many_overdue_or_lost_jobs_are_found_in_one_turn() -> None:
    left = {"end_overdue": [["job"] * MAX_OVERDUE] * 2, "wake": [["job"] * MAX_WAKE] * 3}
    store = SimpleNamespace(
        end_overdue=lambda: left["end_overdue"].pop() if left["end_overdue"] else [],
        wake=lambda model, grace_s: left["wake"].pop() if left["wake"] else ["job"],
    )
    Deadlines(cast(Any, store)).end_overdue()
    Reaper(cast(Any, store), ["m"], LEASE_S).wake()
    assert left == {"end_overdue": [], "wake": []}


def test_each_turn_wakes_the_jobs_of_another_model() -> None:
    woken: list[str] = []
    store = SimpleNamespace(wake=lambda model, grace_s: woken.append(model) or [])
    reaper = Reaper(cast(Any, store), ["a", "b"], LEASE_S)
    for _ in range(3):
        reaper.wake()
    assert woken == ["a", "b", "a"]


# On a real broker.


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    return empty_valkey


def upkeep_of(store: Records, name: str, lease_s: float = LEASE_S) -> Upkeep:
    return Upkeep(store, name, [MODEL.id], Reaper(store, [MODEL.id], lease_s), Deadlines(store))


def lost_job(client: redis.Redis) -> str:
    """A running job whose lease has run out."""
    (job_id,) = submit(client)
    assert Records(client).claim(job_id, "lost@test", 30) is not None
    client.hset(routing.job_key(job_id), "lease_until", 1)
    client.zadd(routing.leases_key(), {job_id: 1})
    return job_id


def status(client: redis.Redis, job_id: str) -> Status:
    return records.run(client, records.get(job_id)).status


def turns_without_a_gap(client: redis.Redis, seconds: float) -> None:
    """As if turns had followed each other for so long."""
    now = client.time()[0]
    client.hset(routing.turns_key(), mapping={"at": now, "since": now - seconds})


@pytest.fixture
def store(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Records:
    store = Records(client)
    monkeypatch.setattr(store, "up_s", lambda: 3600.0)  # that of the test is younger than a lease
    return store


def test_a_job_of_a_lost_worker_is_queued_again(client: redis.Redis, store: Records) -> None:
    job_id = lost_job(client)
    turns_without_a_gap(client, LEASE_S + 1)
    upkeep_of(store, "a").run_once()
    assert status(client, job_id) is Status.QUEUED


def test_a_turn_that_its_holder_never_ends_passes_to_another_when_its_key_expires(client: redis.Redis, store: Records) -> None:
    """The holder was killed between taking the turn and its first duty."""
    job_id = lost_job(client)
    turns_without_a_gap(client, LEASE_S + 1)
    killed, other = upkeep_of(store, "killed"), upkeep_of(store, "other")
    assert killed.take_turn()
    other.run_once()
    assert status(client, job_id) is Status.RUNNING
    assert 0 < client.pttl(routing.turn_key(MODEL.id)) <= TURN_S * 1000, "nothing renews it"
    client.delete(routing.turn_key(MODEL.id))  # as it expires
    other.run_once()
    assert status(client, job_id) is Status.QUEUED


@pytest.mark.parametrize("outage_s", [11.0, None], ids=["an outage", "data without turns"])
def test_after_a_gap_no_process_reclaims_for_one_lease_whether_or_not_it_noticed(
    client: redis.Redis, store: Records, outage_s: float | None
) -> None:
    job_id = lost_job(client)
    turns_without_a_gap(client, 3600)
    if outage_s is None:
        client.delete(routing.turns_key())
    else:
        client.hincrbyfloat(routing.turns_key(), "at", -outage_s)
    for name in ("noticed nothing", "just started"):
        upkeep_of(store, name).do_turn()
        assert status(client, job_id) is Status.RUNNING
    client.hincrbyfloat(routing.turns_key(), "since", -LEASE_S)
    upkeep_of(store, "any").do_turn()
    assert status(client, job_id) is Status.QUEUED


def test_a_pause_shorter_than_a_gap_delays_nothing(client: redis.Redis, store: Records) -> None:
    job_id = lost_job(client)
    turns_without_a_gap(client, 3600)
    client.hincrbyfloat(routing.turns_key(), "at", -8)
    upkeep_of(store, "a").do_turn()
    assert status(client, job_id) is Status.QUEUED


def test_an_overdue_job_that_waits_is_ended_although_no_worker_takes_it(client: redis.Redis, store: Records) -> None:
    overdue, in_time, running = submit(client, 3, deadline_s=1000)
    assert store.claim(running, "busy@test", 30) is not None
    for job_id in (overdue, running):
        client.hset(routing.job_key(job_id), "deadline_at", 1)
        client.zadd(routing.deadlines_key(), {job_id: 1})
    upkeep_of(store, "a").run_once()
    assert [event.type for event in records.run(client, records.events(overdue))][-1] == "job.failed"
    error = records.run(client, records.get(overdue)).error
    assert error is not None and error.code == "deadline_exceeded"
    assert status(client, in_time) is Status.QUEUED
    assert status(client, running) is Status.RUNNING, "its worker hears of it with its next beat"


def test_workers_in_turn_search_on_where_the_one_before_ended(client: redis.Redis) -> None:
    made = submit(client, MAX_WAKE + 3)
    client.delete(*(routing.queue_list(routing.queue_name(MODEL.id, 0), p) for p in range(10)))
    assert set(Records(client).wake(MODEL.id, 0)) == set(made[:MAX_WAKE])
    assert set(Records(client).wake(MODEL.id, 0)) == set(made[MAX_WAKE:]), "another process"
    assert client.hget(routing.turns_key(), f"wake:{MODEL.id}") == "0", "the next search begins at the front"


def test_at_the_memory_bound_turns_are_taken_and_lost_jobs_taken_back(client: redis.Redis, store: Records) -> None:
    job_id = lost_job(client)
    turns_without_a_gap(client, LEASE_S + 1)
    first, second = upkeep_of(store, "a"), upkeep_of(store, "b")
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("latentline:any", "x")
        assert first.take_turn() and not second.take_turn()
        assert 0 < client.pttl(routing.turn_key(MODEL.id)) <= TURN_S * 1000
        store.heartbeat("a", Working())
        first._deadlines.end_overdue()
        first._reaper.reclaim()
    finally:
        client.config_set("maxmemory", "0")
    assert status(client, job_id) is Status.QUEUED


def commands(client: redis.Redis) -> int:
    """Commands since the last reset, those inside of scripts included, without the test's own."""
    stats = client.info("commandstats")
    return sum(found["calls"] for name, found in stats.items() if not name.startswith(("cmdstat_config", "cmdstat_info")))


def test_a_second_of_a_further_idle_worker_costs_one_command_of_maintenance(client: redis.Redis, store: Records) -> None:
    """Its part of the turns, counted: the first worker has the turn, each further one only asks for it."""
    workers = [upkeep_of(store, name) for name in "abcde"]
    workers[0].do_turn()  # the broker knows the scripts now
    client.delete(routing.turn_key(MODEL.id))
    counts = []
    for worker in workers:
        client.config_resetstat()
        worker.run_once()
        counts.append(commands(client))
    assert counts[1:] == [1, 1, 1, 1]
    assert counts[0] < 30
