"""Requests that are sent again get the job of their earlier sending, whichever process answers: the rule stands in the broker."""

from __future__ import annotations

import dataclasses

import pytest
import redis

from latentline import records, routing
from latentline.jobs import JobRequest, Sending, Status, resolve
from latentline.records import Records, run
from latentline.settings import Settings
from latentline.testing import FakeImages, FakeWorker

BODY = "the digest of a key and a body"


@pytest.fixture
def client(empty_valkey: redis.Redis) -> redis.Redis:
    return empty_valkey


def submit(client: redis.Redis, count: int = 0, digest: str = BODY) -> str:
    """A job that a request asks for, sent for the ``count``-th time again."""
    submission = dataclasses.replace(
        resolve(JobRequest.parse({"prompt": "a cat", "num_inference_steps": 1})), sending=Sending(digest, count)
    )
    (record,) = run(client, records.submit([submission], 600))
    return record.id


def take(client: redis.Redis, count: int = 1, digest: str = BODY) -> str | None:
    record = run(client, records.take_unanswered(Sending(digest, count)))
    return record.id if record else None


def note(client: redis.Redis, job_id: str, outcome: records.AnswerOutcome, count: int = 0) -> bool:
    return run(client, records.note_answer(job_id, Sending(BODY, count), outcome))


def run_job(client: redis.Redis) -> None:
    FakeWorker(client, FakeImages()).run_all()


@pytest.mark.parametrize("noted", ["nothing", "dropped", "written"])
def test_a_request_that_is_sent_again_gets_its_job_once_for_each_sending(client: redis.Redis, noted: records.AnswerOutcome) -> None:
    job_id = submit(client)
    if noted != "nothing":
        assert note(client, job_id, noted)
    assert take(client, digest="another body") is None
    assert take(client, 1) == job_id
    assert take(client, 1) is None
    assert not note(client, job_id, "dropped", count=0), "the first sending has no say any more"
    assert take(client, 2) == job_id
    assert take(client, 2) is None


def test_equal_requests_that_are_sent_again_get_a_job_each_and_the_one_whose_client_has_gone_first(client: redis.Redis) -> None:
    gone, answered, open_ = submit(client), submit(client), submit(client)
    assert note(client, gone, "dropped") and note(client, answered, "written")
    assert [take(client, 1) for _ in range(4)] == [gone, open_, answered, None]


def test_the_newest_is_given_first(client: redis.Redis) -> None:
    older, newer = submit(client), submit(client)
    client.zadd(routing.unanswered_key(BODY), {older: 1, newer: 2})
    assert [take(client, 1) for _ in range(3)] == [newer, older, None]


def test_a_job_that_ended_long_ago_is_given_to_nobody(client: redis.Redis) -> None:
    recent, old, unfinished = submit(client), submit(client), submit(client)
    run_job(client)
    now = client.time()[0]
    client.hset(routing.job_key(old), "finished_at", now - records.ENDED_S)
    client.hset(routing.job_key(recent), "finished_at", now - records.ENDED_S + 60)
    client.hdel(routing.job_key(unfinished), "finished_at")
    assert {take(client, 1) for _ in range(2)} == {recent, unfinished} and take(client, 1) is None
    assert not client.zscore(routing.unanswered_key(BODY), old)


def test_an_answer_that_went_out_long_ago_was_received(client: redis.Redis) -> None:
    recent, old = submit(client), submit(client)
    assert note(client, recent, "written") and note(client, old, "written")
    client.hset(routing.job_key(old), "written_at", client.time()[0] - records.WRITTEN_S)
    assert take(client, 1) == recent and take(client, 1) is None


def test_a_job_that_was_deleted_is_given_to_nobody(client: redis.Redis) -> None:
    job_id = submit(client)
    run(client, records.cancel(job_id, 600))
    run(client, records.delete(job_id))
    assert take(client) is None and not note(client, job_id, "dropped") and not client.exists(routing.job_key(job_id))


def test_a_job_is_given_up_only_while_nobody_has_come_back_for_it(client: redis.Redis) -> None:
    job_id = submit(client)
    assert not note(client, job_id, "given up"), "its client is still there"
    assert note(client, job_id, "dropped")
    assert take(client, 1) == job_id
    assert not note(client, job_id, "given up", count=0)
    assert note(client, job_id, "dropped", count=1) and note(client, job_id, "given up", count=1)
    assert take(client, 2) is None


def test_what_is_kept_for_it_expires_and_changes_nothing_in_the_record(client: redis.Redis) -> None:
    job_id = submit(client)
    assert 0 < client.ttl(routing.unanswered_key(BODY)) <= 3600
    run_job(client)
    record = run(client, records.get(job_id))
    assert record.status is Status.SUCCEEDED and Records(client).claim(job_id, "w", 30) is None
    (other,) = run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600))
    assert client.hget(routing.job_key(other.id), "answer") is None


def test_aliases_of_models_are_checked_at_the_start() -> None:
    assert Settings(model_aliases="gpt-image-2=latentline-emoji, sdxl=base/sdxl").aliases == {
        "gpt-image-2": "latentline-emoji", "sdxl": "base/sdxl",
    }  # fmt: skip
    for wrong in ("a", "a=", "=b", "a=b,a=c", "a b=c", "a=b c"):
        with pytest.raises(ValueError, match="each name once"):
            Settings(model_aliases=wrong)
