"""The broker's Lua scripts: how they are put together, named, linted and called."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from latentline import records, routing, scripts
from latentline.connection import connect_async
from latentline.jobs import JobRequest, Phase, Status, resolve
from latentline.records import Beat, Records, Verdict, arun, run
from latentline.scripts import names

FOLDER = Path(scripts.__file__).parent
FILES = sorted(FOLDER.glob("*.lua"))
LIBRARIES = sorted(FOLDER.glob("lib/*.lua"))
ALL = [value for value in vars(scripts).values() if isinstance(value, scripts.Script)]


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    empty_valkey.script_flush()
    return empty_valkey


def submission(**fields: Any) -> records.Operation[Any]:
    return records.submit([resolve(JobRequest.parse({"prompt": "a cat", **fields}))], 600)


def test_every_file_is_a_script_that_python_knows() -> None:
    assert sorted(script.name for script in ALL) == [file.stem for file in FILES]


@pytest.mark.parametrize("file", [*FILES, *LIBRARIES], ids=lambda file: file.name)
def test_a_file_names_the_libraries_that_it_uses_and_no_others(file: Path) -> None:
    text = file.read_text()
    code = re.sub(r"--.*", "", text)
    named = {name for line in re.findall(r"^-- uses: (.+)$", text, re.MULTILINE) for name in line.split(", ")}
    used = {library.stem for library in LIBRARIES if library != file and re.search(rf"\b{library.stem}\.\w", code)}
    assert named == used


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_script_writes_no_key_of_its_own(file: Path) -> None:
    """Keys come from latentline.routing alone."""
    assert routing.PREFIX + ":" not in re.sub(r"--.*", "", file.read_text())


def test_arguments_are_given_by_name_and_checked() -> None:
    assert scripts.RELEASE.arguments(token=3, account="", retention_s=600, id="a job") == ["a job", 3, 600, ""]
    with pytest.raises(TypeError, match=r"'release' takes id, token, retention_s, account; unknown or missing: retention_s"):
        scripts.RELEASE.arguments(id="a job", token=3, account="")
    with pytest.raises(TypeError, match=r"unknown or missing: worker"):
        scripts.RELEASE.arguments(id="a job", token=3, retention_s=600, account="", worker="w")


@pytest.mark.parametrize("name", [name for name in vars(routing) if name.endswith("_key")])
def test_python_and_lua_build_the_same_keys(name: str) -> None:
    function = getattr(routing, name)
    arguments = [f"{parameter}/1" for parameter in inspect.signature(function).parameters]
    client = fakeredis.FakeRedis(decode_responses=True)
    call = f"{names.keys()}\nreturn keys.{name.removesuffix('_key')}(unpack(ARGV))"
    assert client.eval(call, 0, *arguments) == function(*arguments)
    if name == "index_key":
        assert client.eval(call, 0) == function()


def test_lua_writes_the_same_messages_and_lists_as_python(client: redis.Redis) -> None:
    """Names with what Lua's patterns and JSON could stumble over: a model's id may hold dots, dashes and slashes."""
    model = "a-model/with.dots_100"
    for priority in range(10):
        (record,) = run(client, submission(model=model, priority=priority))
        queue = client.hget(routing.job_key(record.id), "queue")
        assert queue == routing.queue_name(model, 0)
        (message,) = client.lrange(routing.queue_list(queue, priority), 0, 0)
        message_id = client.hget(routing.job_key(record.id), "message")
        expected = routing.wake_up(routing.GENERATE_TASK, record.id, queue, priority, message_id)
        assert json.loads(message) == json.loads(expected)


# A broker that does not know a script, after a restart or a failover, gets its text and does the call once.


def test_a_script_is_sent_once_and_called_by_its_sha(client: redis.Redis) -> None:
    client.config_resetstat()
    for _ in range(3):
        run(client, submission())
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert (calls["cmdstat_evalsha"], calls["cmdstat_eval"]) == (3, 1)
    assert client.script_exists(scripts.SUBMIT.sha) == [True]


@pytest.mark.parametrize("flushed", ["submit", "claim", "beat", "settle"])
def test_scripts_that_the_broker_forgets_in_the_middle_of_a_job_are_sent_again(client: redis.Redis, flushed: str) -> None:
    store = Records(client, 600)
    for name in ("submit", "claim", "beat", "settle"):
        if name == flushed:
            client.script_flush()
        if name == "submit":
            (record,) = run(client, submission())
        elif name == "claim":
            claim = store.claim(record.id, "w", 30)
            assert claim is not None
        elif name == "beat":
            assert store.beat([Beat(record.id, claim.token, Phase.DENOISING, step, 30) for step in (1, 2)]) == [Verdict.GO] * 2
        else:
            assert store.settle(record.id, claim.token, Status.SUCCEEDED).attempt == 1
    assert [event.type for event in run(client, records.events(record.id))] == [
        "job.queued", "job.running", "job.progress", "job.progress", "job.succeeded",
    ]  # fmt: skip


def test_many_calls_on_a_broker_that_knows_no_script_are_each_done_once_and_in_order(client: redis.Redis) -> None:
    requests = [JobRequest.parse({"prompt": "a cat", "seed": seed}) for seed in range(20)]
    accepted = run(client, records.submit([resolve(one) for one in requests], 600))
    assert [record.request.seed for record in accepted] == list(range(20))
    assert [record.queue_position for record in accepted] == list(range(20))
    assert client.zcard(routing.index_key()) == 20


def test_calls_beside_one_that_was_not_known_are_not_done_again(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client may teach the broker the script between two calls of one pipeline."""
    ids = [run(client, submission())[0].id for _ in range(4)]
    store = Records(client, 600)
    claims = [store.claim(job_id, "w", 30) for job_id in ids]
    beats = [Beat(claim.record.id, claim.token, Phase.DENOISING, 1, 30, previews=("data:,",)) for claim in claims if claim]
    store.beat([])
    client.script_flush()
    execute = redis.client.Pipeline.execute

    def taught_halfway(pipeline: Any, raise_on_error: bool = True) -> Any:
        commands = pipeline.command_stack
        if len(commands) == 4:  # the first try: the third call finds what another client loaded
            commands.insert(2, (("SCRIPT LOAD", scripts.BEAT.source), {}))
            replies = execute(pipeline, raise_on_error)
            del replies[2]
            return replies
        return execute(pipeline, raise_on_error)

    monkeypatch.setattr(redis.client.Pipeline, "execute", taught_halfway)
    assert store.beat(beats) == [Verdict.GO] * 4
    for job_id in ids:
        kinds = [fields["type"] for _, fields in client.xrange(routing.events_key(job_id))]  # readers get the newest preview alone
        assert (kinds.count("job.progress"), kinds.count("job.preview")) == (1, 1)


def test_an_asyncio_client_sends_what_the_broker_does_not_know_too(valkey_url: str, client: redis.Redis) -> None:
    async def use() -> list[str]:
        asynchronous = connect_async(valkey_url)
        try:
            first, second = [(await arun(asynchronous, submission()))[0] for _ in range(2)]
            cancelled = await arun(asynchronous, records.cancel(first.id, 600))
            assert cancelled.status is Status.CANCELLED
            return [first.id, second.id]
        finally:
            await asynchronous.aclose()

    assert len(set(asyncio.run(use()))) == 2
    assert client.zcard(routing.index_key()) == 2
