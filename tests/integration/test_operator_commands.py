"""``latentline dead`` and ``latentline callbacks`` as an operator types them, on a real Valkey."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from moto import mock_aws

from latentline import records, routing
from latentline.addresses import CallbackRule
from latentline.cli import main
from latentline.errors import JobNotFound
from latentline.images import Images
from latentline.jobs import JobError, JobRequest, Status, resolve
from latentline.records import MAX_ERRORS, Backoff, Records, run
from latentline.testing import MODEL, FakeImages, FakeWorker
from latentline_worker.callbacks.deliverer import Deliverer

PROMPT = "a cat on a roof"
HOOK = "http://127.0.0.1:9/hook"
Command = Callable[..., Result]


@pytest.fixture
def client(valkey_url: str, empty_valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> redis.Redis:
    monkeypatch.setenv("LATENTLINE_REDIS_URL", valkey_url)
    return empty_valkey


@pytest.fixture
def store(client: redis.Redis) -> Records:
    return Records(client, retention_s=600)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that answers: without one, submissions are refused."""
    monkeypatch.setattr(Images, "check", lambda self: None)


@pytest.fixture
def latentline() -> Command:
    def command(*args: str) -> Result:
        result = CliRunner().invoke(main, list(args))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result

    return command


def submit(client: redis.Redis, **fields: Any) -> str:
    request = JobRequest.parse({"prompt": PROMPT, "num_inference_steps": 2, **fields})
    return run(client, records.submit([resolve(request)], 600))[0].id


def exhaust_tries(client: redis.Redis, store: Records, **fields: Any) -> str:
    """A job that ends as a dead letter: every try ended in an error that allows another try."""
    job_id = submit(client, **fields)
    error = JobError(code="store_unavailable", message="the object store is down")
    for _ in range(MAX_ERRORS):
        claim = store.claim(job_id, "cpu@test", 30)
        assert claim is not None
        status, _ = store.retry(job_id, claim.token, error, Backoff(0, 0))
    assert status is Status.FAILED
    return job_id


def end(client: redis.Redis, store: Records, **fields: Any) -> str:
    """A job that has ended; the id of its callback."""
    job_id = submit(client, callback={"url": HOOK}, **fields)
    claim = store.claim(job_id, "cpu@test", 30)
    assert claim is not None
    store.settle(job_id, claim.token, Status.SUCCEEDED)
    return f"msg_{job_id}_succeeded"


def failed_with(result: Result, *words: str) -> bool:
    """Whether there is one line on stderr that names the problem, nothing on stdout, and a failure status."""
    lines = result.stderr.splitlines()
    return (
        result.exit_code in (2, 3)
        and result.stdout == ""
        and len(lines) == 1
        and lines[0].startswith("latentline: ")
        and all(word in lines[0] for word in words)
    )


def test_dead_letters_are_listed_newest_first(client: redis.Redis, store: Records, latentline: Command) -> None:
    job_id = exhaust_tries(client, store)
    store.bury("message-1", "message", "no task message", message="garbage")
    lines = latentline("dead", "list").stdout.splitlines()
    assert lines == ["message-1  message  no task message", f"{job_id}  job  the object store is down"]
    found = json.loads(latentline("dead", "list", "--json").stdout)["dead_letters"]
    assert [letter["id"] for letter in found] == ["message-1", job_id]
    assert found[1]["errors"] == MAX_ERRORS


def test_no_dead_letters_is_an_empty_list(client: redis.Redis, latentline: Command) -> None:
    result = latentline("dead", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(latentline("dead", "list", "--json").stdout)["dead_letters"] == []


def test_a_dead_letter_is_shown_whole(client: redis.Redis, store: Records, latentline: Command) -> None:
    job_id = exhaust_tries(client, store)
    store.bury("message-1", "message", "no task message", message="garbage \x1b[2J")
    letter = json.loads(latentline("dead", "show", job_id).stdout)
    assert (letter["job_id"], letter["kind"], letter["code"]) == (job_id, "job", "store_unavailable")
    shown = latentline("dead", "show", "message-1").stdout
    assert json.loads(shown)["message"] == "garbage \x1b[2J"
    assert "\x1b" not in shown  # control characters of a stranger's message must not reach the terminal


def test_a_dropped_dead_letter_is_gone_and_its_job_is_not(client: redis.Redis, store: Records, latentline: Command) -> None:
    job_id = exhaust_tries(client, store)
    other = exhaust_tries(client, store)
    assert latentline("dead", "drop", job_id).exit_code == 0
    assert [letter["id"] for letter in run(client, records.dead_letters())] == [other]
    assert run(client, records.get(job_id)).status is Status.FAILED
    assert failed_with(latentline("dead", "drop", job_id), job_id)


def test_a_replayed_job_is_a_new_one_with_the_same_request(client: redis.Redis, store: Records, images: None, latentline: Command) -> None:
    worker = FakeWorker(client, FakeImages())
    worker.announce()
    fields: dict[str, Any] = {"seed": 42, "tenant": "acme", "width": 64, "height": 64, "metadata": {"order": 7}}
    dead = exhaust_tries(client, store, idempotency_key="order-7", **fields)
    result = latentline("dead", "replay", dead)
    assert (result.exit_code, result.stderr) == (0, "")
    fresh = result.stdout.strip()
    assert fresh != dead
    assert run(client, records.get(fresh)).request == run(client, records.get(dead)).request.model_copy(update={"idempotency_key": None})
    assert run(client, records.dead_letters()) == []
    worker.run_all()
    assert (run(client, records.get(fresh)).status, run(client, records.get(dead)).status) == (Status.SUCCEEDED, Status.FAILED)


def test_a_replay_that_is_refused_keeps_the_dead_letter(client: redis.Redis, store: Records, images: None, latentline: Command) -> None:
    dead = exhaust_tries(client, store)
    assert failed_with(latentline("dead", "replay", dead), "model", MODEL.id)  # no worker has announced it
    assert [letter["id"] for letter in run(client, records.dead_letters())] == [dead]


def test_a_replay_while_the_store_has_no_bucket_keeps_the_dead_letter(
    client: redis.Redis, store: Records, monkeypatch: pytest.MonkeyPatch, latentline: Command
) -> None:
    for name in ("LATENTLINE_S3_ACCESS_KEY_ID", "LATENTLINE_S3_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test-only")
    FakeWorker(client, FakeImages()).announce()
    dead = exhaust_tries(client, store)
    with mock_aws():
        result = latentline("dead", "replay", dead)
    assert failed_with(result)
    assert [letter["id"] for letter in run(client, records.dead_letters())] == [dead]


def test_a_message_has_nothing_to_replay(client: redis.Redis, store: Records, latentline: Command) -> None:
    store.bury("message-1", "message", "no task message", message="garbage")
    assert failed_with(latentline("dead", "replay", "message-1"), "message-1", "cannot be replayed")
    assert len(run(client, records.dead_letters())) == 1


def test_a_dead_letter_outlives_its_record(client: redis.Redis, store: Records, images: None, latentline: Command) -> None:
    FakeWorker(client, FakeImages()).announce()
    dead = exhaust_tries(client, store)
    client.delete(routing.job_key(dead))
    new = latentline("dead", "replay", dead).stdout.strip()
    assert run(client, records.get(new)).status is Status.QUEUED
    assert run(client, records.dead_letters()) == []


def test_a_dead_letter_of_a_record_that_nobody_can_read_says_so(client: redis.Redis, store: Records, latentline: Command) -> None:
    job_id = submit(client)
    client.hset(routing.job_key(job_id), "request", '{"version": 2}')
    with pytest.raises(JobNotFound):
        store.claim(job_id, "cpu@test", 30)
    assert "cannot read" in latentline("dead", "list").stdout
    assert failed_with(latentline("dead", "replay", job_id), job_id, "cannot read")


@pytest.mark.parametrize("verb", ["show", "replay", "drop"])
@pytest.mark.parametrize("dead_id", ["nobody", "", "*", "ü\n"])
def test_an_unknown_dead_letter_is_named(client: redis.Redis, latentline: Command, verb: str, dead_id: str) -> None:
    assert failed_with(latentline("dead", verb, dead_id), "no dead letter", repr(dead_id))


def test_callbacks_are_listed_newest_first_with_what_came_of_them(client: redis.Redis, store: Records, latentline: Command) -> None:
    first, second = end(client, store), end(client, store)
    Deliverer(store, [], rule=CallbackRule()).deliver(first)
    lines = latentline("callbacks", "list").stdout.splitlines()
    assert lines == [
        f"{second}  pending  tries 0  not tried yet",
        f"{first}  failed  tries 1  LATENTLINE_CALLBACK_SECRET is not set, and the tenant has no secret of its own",
    ]


def test_callbacks_as_json_hold_the_log_and_no_prompt(client: redis.Redis, store: Records, latentline: Command) -> None:
    callback_id = end(client, store)
    Deliverer(store, [], rule=CallbackRule()).deliver(callback_id)
    result = latentline("callbacks", "list", "--json")
    (found,) = json.loads(result.stdout)["callbacks"]
    assert (found["id"], found["status"], found["url"], found["tries"]) == (callback_id, "failed", HOOK, 1)
    assert callback_id == f"msg_{found['job_id']}_succeeded" and found["record"] == found["job_id"]
    assert [entry["try"] for entry in found["log"]] == [1]
    assert PROMPT not in result.stdout


def test_callbacks_of_one_job_and_a_limit(client: redis.Redis, store: Records, latentline: Command) -> None:
    made = [end(client, store) for _ in range(3)]
    job_id = made[0].split("_")[1]
    assert latentline("callbacks", "list", "--job", job_id).stdout.split()[0] == made[0]
    assert len(latentline("callbacks", "list", "--job", job_id).stdout.splitlines()) == 1
    assert [line.split()[0] for line in latentline("callbacks", "list", "--limit", "2").stdout.splitlines()] == [made[2], made[1]]
    assert latentline("callbacks", "list", "--job", "nobody").stdout == ""
    assert latentline("callbacks", "list", "--limit", "0").exit_code == 2


def test_one_record_that_nobody_can_read_does_not_hide_the_other_callbacks(
    client: redis.Redis, store: Records, latentline: Command
) -> None:
    good = end(client, store)
    strange = submit(client, callback={"url": HOOK})
    client.hset(routing.job_key(strange), "request", '{"version": 2}')
    with pytest.raises(JobNotFound):
        store.claim(strange, "cpu@test", 30)
    result = latentline("callbacks", "list")
    assert result.exit_code == 0
    assert good in result.stdout


def test_a_replayed_callback_is_due_again_under_its_id(client: redis.Redis, store: Records, latentline: Command) -> None:
    callback_id = end(client, store)
    deliverer = Deliverer(store, [], rule=CallbackRule())
    deliverer.deliver(callback_id)
    client.delete(routing.CALLBACK_QUEUE)
    result = latentline("callbacks", "replay", callback_id)
    assert (result.exit_code, result.stdout) == (0, f"{callback_id} is sent again\n")
    (message,) = client.lrange(routing.CALLBACK_QUEUE, 0, -1)
    assert json.loads(json.loads(message)["body"])[0] == [callback_id]
    (found,) = run(client, records.callbacks())
    assert (found["id"], found["status"], found["tries"]) == (callback_id, "pending", 0)
    deliverer.deliver(callback_id)
    (found,) = run(client, records.callbacks())
    assert (found["status"], len(found["log"])) == ("failed", 2)


@pytest.mark.parametrize("callback_id", ["msg_nobody_succeeded", "", "*", "ü\n"])
def test_an_unknown_callback_is_named(client: redis.Redis, latentline: Command, callback_id: str) -> None:
    assert failed_with(latentline("callbacks", "replay", callback_id), "no callback", repr(callback_id))
    assert client.keys("*") == []


COMMANDS = [
    ("dead", "list"),
    ("dead", "show", "x"),
    ("dead", "replay", "x"),
    ("dead", "drop", "x"),
    ("callbacks", "list"),
    ("callbacks", "replay", "x"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_broker_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch, latentline: Command, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("LATENTLINE_REDIS_URL", f"redis://127.0.0.1:{port}/0")
    result = latentline(*command)
    assert failed_with(result, "broker") and result.exit_code == 3


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1/", "redis://127.0.0.1:port/0"])
def test_a_broker_url_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, latentline: Command, url: str) -> None:
    monkeypatch.setenv("LATENTLINE_REDIS_URL", url)
    assert failed_with(latentline("dead", "list"), "LATENTLINE_REDIS_URL")


def test_a_wrong_setting_is_named_before_anything_else(client: redis.Redis, monkeypatch: pytest.MonkeyPatch, latentline: Command) -> None:
    monkeypatch.setenv("LATENTLINE_RETENTION_S", "soon")
    for command in COMMANDS:
        assert failed_with(latentline(*command), "LATENTLINE_RETENTION_S")
