"""Unreadable messages: any queue entry can be parsed; what is no wake-up becomes a dead letter and is acknowledged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import kombu.transport.redis
import pytest
import redis
from celery import Celery
from celery.exceptions import Reject
from kombu.utils.json import dumps

from latentline import records
from latentline.errors import BrokerUnavailable
from latentline.records import Records, run
from latentline.routing import GENERATE_TASK, queue_names, wake_up
from latentline.settings import Settings
from latentline_worker.transport import messages
from latentline_worker.transport.app import create_app
from latentline_worker.transport.messages import MAX_KEPT_CHARS, UNREADABLE_TASK, TolerantConsumer, bury

PROMPT = "a very private prompt"


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    made: redis.Redis = fakeredis.FakeRedis(decode_responses=True)
    yield made
    made.close()


@pytest.fixture
def app(client: redis.Redis) -> Iterator[Celery]:
    made = create_app(Settings(), queue_names("latentline-emoji"), Records(client), 16)
    yield made
    made.close()


@pytest.fixture
def loads(app: Celery) -> Callable[..., Any]:
    """The function with which kombu's transport parses queue entries, once an application was created."""
    found: Callable[..., Any] = kombu.transport.redis.loads
    return found


def letters(client: redis.Redis) -> list[dict[str, Any]]:
    return run(client, records.dead_letters())


class FakeMessage:
    def __init__(self, body: Any) -> None:
        self.body, self.acks = body, 0

    def ack(self) -> None:
        self.acks += 1


def consumer_of(store: Any) -> TolerantConsumer:
    """A consumer without a connection: only its handlers are used."""
    consumer = TolerantConsumer.__new__(TolerantConsumer)
    consumer.app = SimpleNamespace(latentline_records=store)
    return consumer


def test_a_wake_up_is_read_as_it_is(loads: Callable[..., Any]) -> None:
    text = wake_up(GENERATE_TASK, "j1", "latentline.generate.m.0", 5, "j1-1")
    assert loads(text) == json.loads(text)


def test_an_unknown_task_s_wake_up_is_left_to_the_consumer_which_names_it(loads: Callable[..., Any]) -> None:
    text = wake_up("some.other.task", "x", "q", 0, "m1")
    assert loads(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "\ufffd\ufffd\x00\x01",
        "null",
        "5",
        '"text"',
        "[]",
        "[1, 2, 3]",
        "{}",
        '{"properties": null}',
        '{"properties": 5}',
        '{"properties": "delivery_tag delivery_info"}',
        '{"properties": ["delivery_tag", "delivery_info"]}',
        '{"body": "x", "headers": {}, "properties": {}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": "t"}}',
        '{"headers": {}, "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        '{"body": "x", "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        # The transport uses these fields unchecked: a message without them would end the worker.
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": "t", "delivery_info": {}}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": "t", "delivery_info": null}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": null, "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": {}, "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": "t", "body_encoding": "base64", '
        '"delivery_info": {"exchange": "", "routing_key": "q"}}}',
        '{"body": "x", "headers": {}, "properties": {"delivery_tag": "t", "body_encoding": "rot13", '
        '"delivery_info": {"exchange": "", "routing_key": "q"}}}',
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_what_is_no_envelope_becomes_a_task_that_buries_it(app: Celery, client: redis.Redis, loads: Callable[..., Any], text: str) -> None:
    envelope = loads(text)
    assert envelope["headers"]["task"] == UNREADABLE_TASK
    assert {"delivery_tag", "delivery_info"} <= envelope["properties"].keys()
    args, kwargs, _ = json.loads(envelope["body"])
    app.tasks[UNREADABLE_TASK](*args, **kwargs)
    (letter,) = letters(client)
    assert (letter["kind"], letter["reason"]) == ("message", "not a message of this system")
    assert letter["message"] == text[:MAX_KEPT_CHARS]


def test_an_unreadable_message_that_cannot_be_kept_goes_back_to_its_queue(
    client: redis.Redis, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise BrokerUnavailable("away")

    pauses: list[float] = []
    monkeypatch.setattr(messages, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(app.latentline_records, "bury", away)
    with pytest.raises(Reject) as rejected:
        app.tasks[UNREADABLE_TASK]("x")
    assert rejected.value.requeue
    assert pauses == [1] * messages.BURY_TRIES
    assert letters(client) == []


def test_unreadable_messages_get_tags_of_their_own(loads: Callable[..., Any]) -> None:
    assert loads("x")["properties"]["delivery_tag"] != loads("x")["properties"]["delivery_tag"]


def test_what_the_transport_keeps_of_unacknowledged_messages_is_still_read(loads: Callable[..., Any]) -> None:
    """kombu parses two things with it: envelopes, and its own ``[envelope, exchange, routing key]`` when it restores messages."""
    envelope = json.loads(wake_up(GENERATE_TASK, "j1", "q", 5, "j1-1"))
    assert loads(dumps([envelope, "", "q"])) == [envelope, "", "q"]


def test_only_so_much_of_an_unreadable_message_is_kept(client: redis.Redis) -> None:
    bury(Records(client), "too long", "x" * (MAX_KEPT_CHARS + 1))
    assert len(letters(client)[0]["message"]) == MAX_KEPT_CHARS


@pytest.mark.parametrize(
    ("handle", "reason"),
    [
        (lambda consumer, message: consumer.on_unknown_message(None, message), "no task message"),
        (lambda consumer, message: consumer.on_unknown_task(None, message, KeyError("os.system")), "unknown task 'os.system'"),
        (lambda consumer, message: consumer.on_invalid_task(None, message, ValueError("no args")), "invalid task: no args"),
        (lambda consumer, message: consumer.on_decode_error(message, ValueError(PROMPT)), "cannot be decoded: ValueError"),
    ],
)
def test_the_consumer_buries_and_acknowledges(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, handle: Callable[[TolerantConsumer, FakeMessage], None], reason: str
) -> None:
    message = FakeMessage(f'{{"prompt": "{PROMPT}"}}')
    with caplog.at_level(logging.INFO):
        handle(consumer_of(Records(client)), message)
    (letter,) = letters(client)
    assert (letter["kind"], letter["reason"], letter["message"]) == ("message", reason, message.body)
    assert message.acks == 1
    assert reason in caplog.text
    assert PROMPT not in caplog.text


def test_a_long_task_name_is_cut_in_the_reason(client: redis.Redis) -> None:
    consumer_of(Records(client)).on_unknown_task(None, FakeMessage("x"), KeyError("y" * 5000))
    assert len(letters(client)[0]["reason"]) < 200


def test_a_message_that_cannot_be_kept_now_stays_with_the_broker(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        def bury(self, *_: Any, **__: Any) -> None:
            raise BrokerUnavailable("away")

    with caplog.at_level(logging.INFO):
        consumer_of(Away()).on_unknown_message(None, message := FakeMessage(PROMPT))
    assert message.acks == 0
    assert "an unreadable message could not be kept: away" in caplog.text
    assert PROMPT not in caplog.text
