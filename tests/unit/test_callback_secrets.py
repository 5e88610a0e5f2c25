"""Callback secrets of tenants: shown once, rotated with an overlap of 24 hours, and signing no other tenant's callbacks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click.testing
import fakeredis
import pytest
from support.receiver import Receiver

from latentline import records, routing
from latentline.addresses import CallbackRule, parse_networks, parse_ports
from latentline.cli import main
from latentline.errors import InvalidRequest, SecretNotFound, WebhookError
from latentline.jobs import JobRequest, resolve
from latentline.keys import NewKey
from latentline.records import Records, run
from latentline.records.secrets import MAX_SECRETS, OVERLAP_S
from latentline.webhooks import generate_secret, verify
from latentline_worker.callbacks.deliverer import Deliverer

COMMON = generate_secret()
LOOPBACK = CallbackRule(parse_networks("127.0.0.0/8"), parse_ports("1-65535"))


@pytest.fixture
def redis() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as made:
        yield made


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def told(redis: fakeredis.FakeRedis, receiver: Receiver, tenant: str, secrets: tuple[str, ...] = (COMMON,)) -> set[str]:
    """Deliver a callback of the tenant; which of all secrets that exist have signed it."""
    request = JobRequest.parse({"prompt": "a cat", "tenant": tenant, "callback": {"url": receiver.url}})
    job = run(redis, records.submit([resolve(request)], 600))[0].id
    run(redis, records.cancel(job, 600))
    count = len(receiver.requests)
    Deliverer(Records(redis, 600), secrets, LOOPBACK).deliver(f"msg_{job}_cancelled")
    if len(receiver.requests) == count:
        return set()
    headers, body = receiver.requests[-1]
    stored = [json.loads(entry)["secret"] for one in ("ann", "bob") for entry in redis.lrange(routing.secret_key(one), 0, -1)]
    return {secret for secret in (COMMON, *stored) if _signed(secret, headers, body)}


def _signed(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        verify(secret, headers, body)
    except WebhookError:
        return False
    return True


def age(redis: fakeredis.FakeRedis, tenant: str, seconds: float) -> None:
    """Make all secrets of a tenant so much older."""
    entries = [json.loads(entry) for entry in redis.lrange(routing.secret_key(tenant), 0, -1)]
    redis.delete(routing.secret_key(tenant))
    for entry in entries:
        redis.rpush(routing.secret_key(tenant), json.dumps(entry | {"at": entry["at"] - seconds}))
    redis.hset(routing.secrets_key(), tenant, json.dumps([entry["at"] - seconds for entry in entries]))


def test_a_tenants_own_secret_signs_its_callbacks_and_no_others(redis: fakeredis.FakeRedis, receiver: Receiver) -> None:
    assert told(redis, receiver, "ann") == {COMMON}
    ann, bob = (run(redis, records.create_secret(tenant)).secret for tenant in ("ann", "bob"))
    assert told(redis, receiver, "ann") == {ann} and told(redis, receiver, "bob") == {bob}
    assert told(redis, receiver, "cat") == {COMMON}
    assert told(redis, receiver, "ann", ()) == {ann}  # also where there is no other
    assert told(redis, receiver, "cat", ()) == set()
    (given_up,) = [one for one in run(redis, records.callbacks()) if one["status"] == "failed"]
    assert "LATENTLINE_CALLBACK_SECRET" in given_up["log"][-1]["result"]
    run(redis, records.revoke_secrets("ann"))
    assert told(redis, receiver, "ann") == {COMMON} and told(redis, receiver, "bob") == {bob}


def test_for_a_day_after_a_rotation_both_secrets_sign(redis: fakeredis.FakeRedis, receiver: Receiver) -> None:
    old = run(redis, records.create_secret("ann")).secret
    age(redis, "ann", 40 * OVERLAP_S)
    new = run(redis, records.rotate_secret("ann")).secret
    assert told(redis, receiver, "ann") == {old, new}
    age(redis, "ann", OVERLAP_S - 60)
    newest = run(redis, records.rotate_secret("ann")).secret
    assert told(redis, receiver, "ann") == {old, new, newest}
    age(redis, "ann", 61)
    assert told(redis, receiver, "ann") == {new, newest}
    assert len(run(redis, records.secret_times())["ann"]) == 2
    age(redis, "ann", OVERLAP_S)
    assert told(redis, receiver, "ann") == {newest}
    run(redis, records.rotate_secret("ann"))
    assert redis.llen(routing.secret_key("ann")) == 2  # those that sign no more are deleted by the next rotation


def test_many_rotations_leave_a_bounded_list(redis: fakeredis.FakeRedis) -> None:
    run(redis, records.create_secret("ann"))
    for _ in range(MAX_SECRETS + 2):
        run(redis, records.rotate_secret("ann"))
    assert redis.llen(routing.secret_key("ann")) == MAX_SECRETS == len(run(redis, records.secret_times())["ann"])


def test_revoking_a_key_leaves_the_tenants_secret(redis: fakeredis.FakeRedis, receiver: Receiver) -> None:
    secret = run(redis, records.create_secret("ann")).secret
    _, key = run(redis, records.create_key(NewKey.parse(tenant="ann")))
    run(redis, records.revoke_key(key.prefix))
    assert told(redis, receiver, "ann") == {secret}


def test_a_second_secret_is_made_by_rotating_and_names_are_checked(redis: fakeredis.FakeRedis) -> None:
    with pytest.raises(SecretNotFound, match="'ann'"):
        run(redis, records.rotate_secret("ann"))
    with pytest.raises(SecretNotFound, match="'ann'"):
        run(redis, records.revoke_secrets("ann"))
    run(redis, records.create_secret("ann"))
    for tenant in ("ann", "..", "a/b", ""):
        with pytest.raises(InvalidRequest) as refused:
            run(redis, records.create_secret(tenant))
        assert refused.value.field == "tenant"


def test_a_secret_that_cannot_be_read_puts_the_callback_off_and_is_not_shown(redis: fakeredis.FakeRedis, receiver: Receiver) -> None:
    redis.lpush(routing.secret_key("ann"), "whsec_not-json")
    assert told(redis, receiver, "ann") == set() and receiver.requests == []
    (one,) = run(redis, records.callbacks())
    assert one["status"] == "pending" and "rotate" in one["log"][-1]["result"] and "whsec" not in one["log"][-1]["result"]


def test_secrets_are_made_rotated_listed_and_revoked_by_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    server = fakeredis.FakeServer()
    monkeypatch.setattr("latentline.cli.broker.connect", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))

    def call(*args: str, code: int = 0) -> click.testing.Result:
        result = click.testing.CliRunner().invoke(main, ["secrets", *args])
        assert result.exit_code == code, result.output
        return result

    first = call("create", "ann").stdout.strip()
    rotated = call("rotate", "ann", "--json")
    made = json.loads(rotated.stdout)
    assert made["secret"].startswith("whsec_") and made["secret"] != first and made["tenant"] == "ann"
    assert "signs as well until" in rotated.stderr
    call("create", "bob")
    shown = call("list").stdout + call("list", "--json").stdout
    assert [line.split()[0] for line in call("list").stdout.splitlines()] == ["ann", "bob"] and "whsec" not in shown
    assert [len(one["created_at"]) for one in json.loads(call("list", "--json").stdout)["tenants"]] == [2, 1]
    call("revoke", "ann")
    assert "no callback secret" in call("rotate", "ann", code=2).stderr
    assert "rotating" in call("create", "bob", code=2).stderr
