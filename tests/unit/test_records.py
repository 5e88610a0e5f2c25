"""Records: one conformance suite, run against fakeredis and against a real Valkey."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import fakeredis
import pytest
import redis
from support.jobs import accepted

from latentline import records, routing
from latentline.connection import connect, connect_async
from latentline.errors import BrokerUnavailable, IdempotencyConflict, InvalidRequest, JobNotFound, StaleToken, TenantQuotaExceeded
from latentline.jobs import ImageRef, JobError, JobRequest, ModelInfo, Phase, Status, resolve
from latentline.records import Backoff, Beat, Records, Signal, Verdict, arun, held, run

BACKOFF = Backoff(first_s=60, most_s=1000, jitter=0.5)
IMAGE = ImageRef(key="t/j/1/0.png", seed=1, width=64, height=64, content_type="image/png", sha256="0" * 64, num_bytes=3)


@pytest.fixture(params=["fakeredis", "valkey"])
def client(request: pytest.FixtureRequest) -> redis.Redis:
    if request.param == "fakeredis":
        return fakeredis.FakeRedis(decode_responses=True)
    real: redis.Redis = request.getfixturevalue("empty_valkey")
    return real


@pytest.fixture
def store(client: redis.Redis) -> Records:
    return Records(client, retention_s=600)


def submit(client: redis.Redis, **fields: Any) -> str:
    request = JobRequest.parse({"prompt": "a cat", **fields})
    return accepted(run(client, records.submit([resolve(request)], 600)))[0].id


def queue(priority: int) -> str:
    """The list in which a lone tenant's jobs wait: the first shard was empty."""
    return routing.queue_list(routing.queue_name("latentline-emoji"), priority)


def taken(client: redis.Redis) -> str | None:
    """The job of the message that is served next, which is gone from the queue then."""
    message = client.rpop(queue(5))
    return None if message is None else str(json.loads(json.loads(str(message))["body"])[0][0])


def taken_from_any(client: redis.Redis) -> bool:
    """Whether any shard had a message, which is gone then."""
    return any(client.rpop(routing.queue_list(name, 5)) for name in routing.queue_names("latentline-emoji"))


def run_out(client: redis.Redis, job_id: str) -> None:
    """Let the job's lease have run out long ago."""
    client.hset(routing.job_key(job_id), "lease_until", 1)
    client.zadd(routing.leases_key(), {job_id: 1})


def seconds(client: redis.Redis) -> float:
    """The broker's clock."""
    whole, micro = client.time()
    return float(whole + micro / 1e6)


def kinds(client: redis.Redis, job_id: str) -> list[str]:
    return [event.type for event in run(client, records.events(job_id))]


def test_a_submitted_job_is_queued_with_its_wake_up(client: redis.Redis) -> None:
    job_id = submit(client, priority=4)
    record = run(client, records.get(job_id))
    assert (record.status, record.queue_position, record.num_steps, record.attempt) == (Status.QUEUED, 0, 20, 0)
    assert client.llen(queue(4)) == 1
    assert kinds(client, job_id) == ["job.queued"]


def test_the_wake_up_holds_no_prompt(client: redis.Redis) -> None:
    submit(client, prompt="a very secret cat")
    message = client.lrange(queue(5), 0, -1)[0]
    assert "secret" not in message


def test_queue_position_follows_priority_then_time(client: redis.Redis) -> None:
    late, urgent = submit(client, priority=5), submit(client, priority=1)
    assert run(client, records.get(urgent)).queue_position == 0
    assert run(client, records.get(late)).queue_position == 1


def test_the_whole_life_of_a_job(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "cpu@host", 30)
    assert claim is not None
    assert (claim.record.status, claim.record.phase, claim.record.attempt, claim.record.worker) == ("running", "encoding", 1, "cpu@host")
    beat = Beat(job_id, claim.token, Phase.DENOISING, 3, 30, batch_jobs=2)
    assert store.beat([beat, beat]) == [Verdict.GO, Verdict.GO]
    running = run(client, records.get(job_id))
    assert (running.phase, running.step, running.queue_position) == (Phase.DENOISING, 3, None)
    done = store.settle(job_id, claim.token, Status.SUCCEEDED, images=[IMAGE], timings={"denoising_s": 1.5})
    assert (done.status, done.step, done.images, done.timings) == (Status.SUCCEEDED, 20, (IMAGE,), {"denoising_s": 1.5})
    assert done.created_at <= (done.started_at or 0) <= (done.finished_at or 0)
    # The second, equal beat added no event.
    assert kinds(client, job_id) == ["job.queued", "job.running", "job.progress", "job.succeeded"]
    assert client.ttl(routing.job_key(job_id)) > 0


def test_a_job_is_claimed_once_while_its_lease_lives(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    assert store.claim(job_id, "one", 30) is not None
    assert store.claim(job_id, "two", 30) is None


def test_a_claim_whose_answer_was_lost_is_answered_again(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    first = store.claim(job_id, "one", 30, claim_id="a")
    assert first is not None and store.claim(job_id, "one", 30, claim_id="a") == first
    assert store.claim(job_id, "one", 30, claim_id="b") is None, "a second message to the same worker is another claim"


def test_a_lease_that_has_run_out_is_the_reapers(client: redis.Redis, store: Records) -> None:
    """It knows when all leases ran out because the broker was away; a message that comes twice does not."""
    job_id = submit(client)
    assert store.claim(job_id, "one", 0.0) is not None
    assert store.claim(job_id, "two", 30) is None
    assert store.reclaim() == [job_id] and store.claim(job_id, "two", 30) is not None


def test_after_the_lease_the_newest_token_alone_may_settle(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    old = store.claim(job_id, "zombie", 0.0)
    assert store.reclaim() == [job_id]
    new = store.claim(job_id, "heir", 30)
    assert old and new and new.token > old.token and new.record.attempt == 2
    assert store.beat([Beat(job_id, old.token, Phase.DENOISING, 9, 30)]) == [Verdict.STALE]
    with pytest.raises(StaleToken):
        store.settle(job_id, old.token, Status.FAILED)
    assert not store.release(job_id, old.token)
    store.settle(job_id, new.token, Status.SUCCEEDED)
    with pytest.raises(StaleToken):
        store.settle(job_id, new.token, Status.FAILED)
    assert kinds(client, job_id).count("job.succeeded") == 1


def lose(client: redis.Redis, store: Records, job_id: str, *, alone: bool, at: int = 0) -> None:
    """A worker takes the job and is never heard of again after this step."""
    claim = store.claim(job_id, "lost", 0.0, alone=alone)
    assert claim
    if at:
        store.beat([Beat(job_id, claim.token, Phase.DENOISING, at, 30)])
    run_out(client, job_id)
    assert store.reclaim() == [job_id]
    with pytest.raises(StaleToken):
        store.settle(job_id, claim.token, Status.SUCCEEDED)


def test_a_lost_workers_job_is_queued_again_and_runs_alone_after_two(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    for _ in range(2):
        assert not store.suspect(job_id)
        lose(client, store, job_id, alone=False)
        assert run(client, records.get(job_id)).status is Status.QUEUED
    assert store.suspect(job_id)
    lose(client, store, job_id, alone=True)
    assert run(client, records.get(job_id)).status is Status.QUEUED
    lose(client, store, job_id, alone=True)
    record = run(client, records.get(job_id))
    assert record.error is not None and (record.status, record.error.code) == (Status.FAILED, "worker_lost")
    assert [letter["job_id"] for letter in run(client, records.dead_letters())] == [job_id]
    assert store.reclaim() == []


def test_a_job_that_gets_further_in_each_life_is_not_what_kills_its_workers(client: redis.Redis, store: Records) -> None:
    """Workers that are killed from outside, over and over, cost it time and nothing else."""
    job_id = submit(client)
    for step in range(1, 10):
        lose(client, store, job_id, alone=True, at=step)
    assert run(client, records.get(job_id)).status is Status.QUEUED and not store.suspect(job_id)
    for _ in range(2):  # the same step over and over is another matter
        lose(client, store, job_id, alone=True, at=9)
    assert run(client, records.get(job_id)).status is Status.FAILED


def test_what_kills_its_workers_at_one_step_ends_after_five_of_them(client: redis.Redis, store: Records) -> None:
    """Wherever its checkpoints let each life begin."""
    job_id = submit(client)
    lives = 0
    while run(client, records.get(job_id)).status is Status.QUEUED:
        alone = store.suspect(job_id)
        claim = store.claim(job_id, "w", 30, alone=alone)
        assert claim and claim.record.step == lives
        lives += 1
        assert store.checkpoint(job_id, claim.token, lives, b"state")
        store.beat([Beat(job_id, claim.token, Phase.DENOISING, 12, 30)])
        run_out(client, job_id)
        assert store.reclaim() == [job_id]
    error = run(client, records.get(job_id)).error
    assert (lives, error and error.code) == (5, "worker_lost")


def test_company_in_a_crash_is_never_a_reason_to_fail(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    for _ in range(10):
        lose(client, store, job_id, alone=False)
    assert run(client, records.get(job_id)).status is Status.QUEUED


def test_errors_are_retried_later_and_end_as_a_dead_letter(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    error = JobError(code="store_unavailable", message="no answer")
    for attempt in range(1, records.MAX_ERRORS):
        claim = store.claim(job_id, "w", 30)
        assert claim and claim.record.attempt == attempt
        assert store.retry(job_id, claim.token, error, BACKOFF) == (Status.QUEUED, 60 * 2 ** (attempt - 1) * 0.5)
        assert store.claim(job_id, "w", 30) is None, "not before it is due"
        assert store.wake("latentline-emoji", 0) == []
        client.zadd(routing.delayed_key(), {job_id: 1})
        assert store.wake("latentline-emoji", 0) == [job_id]
    claim = store.claim(job_id, "w", 30)
    assert claim and store.retry(job_id, claim.token, error, BACKOFF)[0] is Status.FAILED
    (letter,) = run(client, records.dead_letters())
    assert (letter["job_id"], letter["code"], letter["errors"]) == (job_id, "store_unavailable", records.MAX_ERRORS)
    assert run(client, records.dead_letter(job_id)) == letter
    run(client, records.drop_dead_letter(job_id))
    with pytest.raises(JobNotFound):
        run(client, records.dead_letter(job_id))


def test_only_the_newest_holder_may_ask_for_another_try(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    error = JobError(code="internal", message="x")
    old = store.claim(job_id, "zombie", 0.0)
    assert old and store.reclaim() == [job_id]
    with pytest.raises(StaleToken):
        store.retry(job_id, old.token, error, BACKOFF)
    new = store.claim(job_id, "heir", 30)
    with pytest.raises(StaleToken):
        store.retry(job_id, old.token, error, BACKOFF)
    assert new and run(client, records.get(job_id)).status is Status.RUNNING
    store.settle(job_id, new.token, Status.SUCCEEDED)
    with pytest.raises(StaleToken):
        store.retry(job_id, new.token, error, BACKOFF)
    assert run(client, records.get(job_id)).status is Status.SUCCEEDED and run(client, records.dead_letters()) == []


def test_a_failed_try_of_a_job_whose_cancel_was_asked_for_cancels_it(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    run(client, records.cancel(job_id, 600))
    assert claim and store.retry(job_id, claim.token, JobError(code="internal", message="x"), BACKOFF)[0] is Status.CANCELLED
    assert run(client, records.get(job_id)).status is Status.CANCELLED and not client.exists(routing.delayed_key(), routing.dead_key())


@pytest.mark.parametrize(("deadline_in_s", "status"), [(29, Status.FAILED), (600, Status.QUEUED)])
def test_a_try_that_would_begin_after_the_deadline_is_not_waited_for(
    client: redis.Redis, store: Records, deadline_in_s: float, status: Status
) -> None:
    job_id = submit(client, deadline_s=deadline_in_s)
    claim = store.claim(job_id, "w", 30)
    error = JobError(code="store_unavailable", message="no answer")
    assert claim and store.retry(job_id, claim.token, error, BACKOFF) == (status, 30)
    assert run(client, records.get(job_id)).error == (error if status is Status.FAILED else None)
    assert len(run(client, records.dead_letters())) == (status is Status.FAILED)


def test_the_delay_before_another_try_is_bounded(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    backoff = Backoff(first_s=60, most_s=50, jitter=0.5)
    assert claim and store.retry(job_id, claim.token, JobError(code="internal", message="x"), backoff) == (Status.QUEUED, 25)
    due, now = client.zscore(routing.delayed_key(), job_id), seconds(client)
    assert due is not None and 24 < due - now <= 25


def test_a_beat_renews_the_lease_for_its_whole_length(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 1)
    assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30)]) == [Verdict.GO]
    lease_until = float(client.hget(routing.job_key(job_id), "lease_until") or 0)
    assert 29 < lease_until - seconds(client) <= 30
    assert client.zscore(routing.leases_key(), job_id) == pytest.approx(lease_until, abs=0.001)


def test_a_claim_holds_the_lease_that_was_asked_for(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    assert store.claim(job_id, "w", 30)
    lease_until = float(client.hget(routing.job_key(job_id), "lease_until") or 0)
    assert 29 < lease_until - seconds(client) <= 30
    assert client.zscore(routing.leases_key(), job_id) == pytest.approx(lease_until, abs=0.001)


def test_a_checkpoint_is_kept_for_a_day(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.checkpoint(job_id, claim.token, 1, b"x")
    assert 86400 - 5 < client.ttl(routing.checkpoint_key(job_id)) <= 86400


def test_a_checkpoint_is_kept_for_the_next_owner_and_fenced(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    data = bytes(range(256)) * 40
    old = store.claim(job_id, "w", 30)
    assert old and store.load_checkpoint(job_id) is None
    assert store.checkpoint(job_id, old.token, 7, data)
    assert store.release(job_id, old.token)
    assert run(client, records.get(job_id)).step == 7
    new = store.claim(job_id, "v", 30)
    assert new and new.record.step == 7 and store.load_checkpoint(job_id) == data
    assert not store.checkpoint(job_id, old.token, 9, b"zombie")
    assert store.load_checkpoint(job_id) == data
    store.settle(job_id, new.token, Status.SUCCEEDED)
    assert store.load_checkpoint(job_id) is None


def test_a_lost_message_is_written_again_and_one_on_its_way_is_not(client: redis.Redis, store: Records) -> None:
    first, second = submit(client), submit(client)
    assert store.wake("latentline-emoji", 3600) == []
    assert store.wake("latentline-emoji", 0) == [], "both messages are there"
    client.delete(queue(5))
    assert set(store.wake("latentline-emoji", 0)) == {first, second}
    assert client.llen(queue(5)) == 2
    assert store.wake("latentline-emoji", 0) == [], "they are there again"
    assert [taken(client) for _ in range(2)] == [first, second], "in their old order"


def test_one_lost_message_among_many_is_found_and_the_others_stay_as_they_are(client: redis.Redis, store: Records) -> None:
    """Also when jobs that came back stand before older messages."""
    ids = [submit(client) for _ in range(8)]
    claim = store.claim(str(taken(client)), "w", 30)
    assert claim and store.release(ids[0], claim.token)
    assert store.wake("latentline-emoji", 0) == [], "one that came back stands at the front"
    assert [taken(client) for _ in range(3)] == ids[:3]  # and are lost, as nobody claims them
    assert store.wake("latentline-emoji", 0) == [ids[2], ids[1], ids[0]]
    assert store.wake("latentline-emoji", 0) == []
    assert [taken(client) for _ in ids] == ids


def test_lost_messages_of_many_jobs_are_found_page_by_page(client: redis.Redis, store: Records) -> None:
    requests = [JobRequest.parse({"prompt": "a cat"}) for _ in range(records.MAX_WAKE + 10)]
    made = [record.id for record in accepted(run(client, records.submit([resolve(one) for one in requests], 600)))]
    client.delete(queue(5))
    assert set(store.wake("latentline-emoji", 0)) == set(made[: records.MAX_WAKE])
    assert set(store.wake("latentline-emoji", 0)) == set(made[records.MAX_WAKE :])
    assert client.llen(queue(5)) == len(made)
    assert store.wake("latentline-emoji", 0) == []


def test_a_tenants_jobs_share_a_shard_and_others_have_their_own(client: redis.Redis, store: Records) -> None:
    for _ in range(3):
        submit(client, tenant="busy")
    submit(client, tenant="quiet")
    lengths = [client.llen(routing.queue_list(name, 5)) for name in routing.queue_names("latentline-emoji")]
    assert sorted(lengths, reverse=True)[:2] == [3, 1]


def test_a_tenant_that_comes_anew_gets_a_shard_of_its_own_also_when_all_are_empty(client: redis.Redis, store: Records) -> None:
    """And leaves it with its last job: nothing is kept of tenants that are gone."""
    jobs = {tenant: submit(client, tenant=tenant) for tenant in ("one", "two", "three")}
    while taken_from_any(client):  # workers have them in their hands
        pass
    assert submit(client, tenant="four")
    assert sorted(client.hvals(routing.shards_key("latentline-emoji"))) == ["0", "1", "2", "3"]
    run(client, records.cancel(jobs["two"], 600))
    assert set(client.hkeys(routing.shards_key("latentline-emoji"))) == {"one", "three", "four"}
    submit(client, tenant="five")
    assert client.hget(routing.shards_key("latentline-emoji"), "five") == "1"
    assert client.hkeys(routing.open_key("latentline-emoji")) == ["one", "three", "four", "five"]


def test_a_job_that_another_worker_has_taken_meanwhile_stays_where_it_can_be_found(client: redis.Redis, store: Records) -> None:
    """The reaper looks at leases first and acts later: what has changed in between counts."""
    job_id = submit(client)
    assert store.claim(job_id, "w", 30)
    client.zadd(routing.leases_key(), {job_id: 1})  # what a slow reaper believes; the record knows better
    assert store.reclaim() == []
    assert client.zscore(routing.index_key(Status.RUNNING), job_id) is not None
    client.delete(routing.job_key(job_id))
    assert store.reclaim() == []
    assert client.zscore(routing.index_key(Status.RUNNING), job_id) is None
    assert client.zcard(routing.leases_key()) == 0


def test_dead_letters_are_kept_for_a_month_and_not_without_bound(
    client: redis.Redis, store: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "newer", "newest"):
        store.bury(name, "message", "a reason")
    client.zadd(routing.dead_times_key(), {"old": 1})
    store.expired()
    assert [letter["id"] for letter in run(client, records.dead_letters())] == ["newest", "newer"]
    monkeypatch.setattr("latentline.records.maintenance.DEAD_MOST", 1)
    client.zincrby(routing.dead_times_key(), 1, "newest")
    store.expired()
    assert [letter["id"] for letter in run(client, records.dead_letters())] == ["newest"]
    run(client, records.drop_dead_letter("newest"))
    assert not client.exists(routing.dead_key(), routing.dead_times_key())


def test_deliverers_with_enough_to_do_get_no_second_messages(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, callback={"url": "http://127.0.0.1:9/"})
    run(client, records.cancel(job_id, 600))
    assert store.wake_callbacks() == 0, "its message is on its way"
    client.zadd(routing.due_callbacks_key(), {f"msg_{job_id}_cancelled": 1})
    client.lpush(routing.CALLBACK_QUEUE, *["x"] * 1000)
    assert store.wake_callbacks() == 0
    client.delete(routing.CALLBACK_QUEUE)
    assert store.wake_callbacks() == 1


# Deadlines of jobs that no worker takes.


def passed(client: redis.Redis, job_id: str) -> None:
    """Let the job's deadline have passed long ago."""
    client.hset(routing.job_key(job_id), "deadline_at", 1)
    client.zadd(routing.deadlines_key(), {job_id: 1})


def test_a_queued_job_past_its_deadline_is_ended_without_being_claimed(client: redis.Redis, store: Records) -> None:
    callback = {"url": "https://example.com/hook"}
    overdue = submit(client, deadline_s=600, tenant="t", callback=callback)
    in_time, without = submit(client, deadline_s=600), submit(client)
    assert store.end_overdue() == []
    passed(client, overdue)
    assert store.end_overdue() == [overdue]
    raw = client.hgetall(routing.job_key(overdue))
    assert raw["status"] == "failed" and json.loads(raw["error"])["code"] == "deadline_exceeded"
    assert kinds(client, overdue) == ["job.queued", "job.failed"]
    assert [told["type"] for told in run(client, records.callbacks(overdue))] == ["job.failed"]
    assert client.hget(routing.tenants_key(), "t") is None, "it is charged to its tenant no more"
    assert 0 < client.ttl(routing.job_key(overdue)) <= 600, "kept as this worker's retention says"
    assert client.zrange(routing.deadlines_key(), 0, -1) == [in_time]
    assert store.claim(overdue, "w", 30) is None, "its message comes too late"
    assert {run(client, records.get(job_id)).status for job_id in (in_time, without)} == {Status.QUEUED}
    assert store.end_overdue() == []


def test_the_deadline_of_a_job_that_waits_for_another_try_is_kept(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, deadline_s=600)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.retry(job_id, claim.token, JobError(code="internal", message="x"), BACKOFF)[0] is Status.QUEUED
    passed(client, job_id)
    assert store.end_overdue() == [job_id]
    assert not client.exists(routing.delayed_key(), routing.deadlines_key())


def test_the_deadline_of_a_running_job_is_its_workers_until_that_is_lost(client: redis.Redis, store: Records) -> None:
    held, lost = submit(client, deadline_s=600), submit(client, deadline_s=600)
    claims = [store.claim(job_id, "w", 30) for job_id in (held, lost)]
    passed(client, held)
    passed(client, lost)
    assert store.end_overdue() == []
    assert set(client.zrange(routing.deadlines_key(), 0, -1)) == {held, lost}, "they are looked at again"
    assert store.end_overdue() == [] and min(score for _, score in client.zrange(routing.deadlines_key(), 0, -1, withscores=True)) > 1
    assert claims[0] and store.beat([Beat(held, claims[0].token, Phase.DENOISING, 1, 30)]) == [Verdict.EXPIRED]
    assert store.release(held, claims[0].token)
    assert store.end_overdue() == [held], "given back past its deadline: it does not wait until it would have been looked at again"
    run_out(client, lost)
    assert store.reclaim() == [lost]
    assert client.hget(routing.job_key(lost), "status") == "failed", "not queued again (a reader would end it then)"
    error = run(client, records.get(lost)).error
    assert error is not None and error.code == "deadline_exceeded"


def test_deadlines_that_older_processes_left_or_never_wrote(client: redis.Redis, store: Records) -> None:
    ended, expired, unknown = (submit(client, deadline_s=600) for _ in range(3))
    run(client, records.cancel(ended, 600))
    client.delete(routing.job_key(expired))
    client.zadd(routing.deadlines_key(), {ended: 1, expired: 1})  # version 0.1.0 ended them
    client.zrem(routing.deadlines_key(), unknown)  # version 0.1.0 submitted it
    store.wake("latentline-emoji", 0)
    assert store.end_overdue() == []
    assert client.zrange(routing.deadlines_key(), 0, -1) == [unknown]
    assert client.zscore(routing.deadlines_key(), unknown) == pytest.approx(
        float(client.hget(routing.job_key(unknown), "deadline_at") or 0), abs=0.001
    )


def test_readers_end_an_overdue_job_when_no_worker_does(client: redis.Redis) -> None:
    """All that is needed is someone who looks: at the record, at a list, or at the events."""
    looked_up, listed, followed, running, waits = (submit(client, deadline_s=600) for _ in range(5))
    Records(client).claim(running, "w", 30)
    for job_id in (looked_up, listed, followed, running):
        client.hset(routing.job_key(job_id), "deadline_at", 1)
    record = run(client, records.get(looked_up))
    assert record.error is not None and (record.status, record.error.code) == (Status.FAILED, "deadline_exceeded")
    assert 0 < client.ttl(routing.job_key(looked_up)) <= 600, "kept as the submitter's retention says"
    assert [event.type for event in run(client, records.follow(followed, None, 1))[0]] == ["job.queued", "job.failed"]
    assert [record.id for record in run(client, records.list_jobs(Status.QUEUED))[0]] == [waits]
    assert {record.id: record.status for record in run(client, records.list_jobs())[0]} == {
        looked_up: Status.FAILED, listed: Status.FAILED, followed: Status.FAILED, running: Status.RUNNING, waits: Status.QUEUED,
    }  # fmt: skip


# Previews: the newest alone, beside the stream.


def preview(text: str) -> tuple[str, ...]:
    return (f"data:image/webp;base64,{text}",)


def shown(client: redis.Redis, job_id: str, after: str | None = None) -> list[dict[str, Any]]:
    return [event.data for event in run(client, records.events(job_id, after)) if event.type == "job.preview"]


def test_a_follower_gets_each_preview_live(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    last = run(client, records.events(job_id))[-1].id
    for step in (1, 2, 3):
        assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, step, 30, 1, preview(str(step)))])
        found, ended = run(client, records.follow(job_id, last, 1))
        assert [event.type for event in found] == ["job.progress", "job.preview"] and not ended
        data = found[-1].data
        assert (data["step"], data["num_steps"], tuple(data["images"])) == (step, 20, preview(str(step)))
        assert data["seq"] == found[0].data["seq"] + 1
        last = found[-1].id


def test_after_a_reconnect_there_is_the_newest_preview_and_no_other(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    for step in (1, 2, 3):
        assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, step, 30, 1, preview(str(step)))])
    assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, 4, 30)])
    assert [(data["step"], tuple(data["images"])) for data in shown(client, job_id)] == [(3, preview("3"))]


def test_a_preview_that_was_replaced_while_it_was_read_still_gets_its_reader_ahead(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30, 1, preview("a"))])
    client.delete(routing.preview_key(job_id))
    assert [data["images"] for data in shown(client, job_id)] == [[]]


@pytest.mark.parametrize("end", ["succeeded", "cancelled", "expired"])
def test_a_preview_goes_when_its_job_ends(client: redis.Redis, store: Records, end: str) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30, 1, preview("a"))])
    assert client.exists(routing.preview_key(job_id))
    if end == "succeeded":
        store.settle(job_id, claim.token, Status.SUCCEEDED)
    elif end == "cancelled":
        assert store.release(job_id, claim.token)
        assert client.exists(routing.preview_key(job_id)), "not while it may go on"
        run(client, records.cancel(job_id, 600))
    else:  # version 0.1.0 ended it, which knows no previews beside the stream
        client.zadd(routing.expiring_key(), {f"default/{job_id}": 1})
        store.expired()
    assert not client.exists(routing.preview_key(job_id))
    if end == "succeeded":
        assert shown(client, job_id) == []


def test_a_preview_event_without_a_number_is_passed_over(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    for kind in ("job.preview", "job.progress"):
        client.xadd(routing.events_key(job_id), {"type": kind, "at": "1", "data": "{}"})
    assert kinds(client, job_id) == ["job.queued", "job.progress"]


def test_previews_of_a_worker_of_before_are_read_as_they_are(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    data = json.dumps({"seq": 2, "step": 1, "num_steps": 20, "images": ["data:,a"]})
    client.xadd(routing.events_key(job_id), {"type": "job.preview", "at": "1.0", "data": data})
    assert [data["images"] for data in shown(client, job_id)] == [["data:,a"]]


def test_a_stream_stays_small_however_many_previews_there_were(valkey_url: str) -> None:
    client = connect(valkey_url)
    client.flushall()
    store = Records(client)
    job_id = submit(client, num_inference_steps=150)
    claim = store.claim(job_id, "w", 30)
    assert claim
    for step in range(1, 151):
        store.beat([Beat(job_id, claim.token, Phase.DENOISING, step, 30, 1, preview("x" * 60_000))])
    # 150 previews of 60 kB would be 9 MB. Each leaves an event of about 100 bytes, and one picture is kept.
    assert client.memory_usage(routing.events_key(job_id), samples=0) < 100_000
    assert 60_000 < client.memory_usage(routing.preview_key(job_id), samples=0) < 100_000
    client.close()


# Rows and caps.


def test_a_tenants_cap(client: redis.Redis, store: Records) -> None:
    def give(tenant: str) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 10, "tenant": tenant})  # 20 rows
        return accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=50)))[0].id

    first, second = give("a"), give("a")
    with pytest.raises(TenantQuotaExceeded, match="tenant 'a' has 40 rows"):
        give("a")
    give("b")
    claim = store.claim(first, "w", 30)
    assert claim
    store.settle(first, claim.token, Status.SUCCEEDED)
    give("a")
    for job in run(client, records.list_jobs(Status.QUEUED))[0]:
        run(client, records.cancel(job.id, 600))
    assert client.hgetall(routing.tenants_key()) == {}
    assert run(client, records.get(second)).status is Status.CANCELLED


@pytest.mark.parametrize("steps", [10, 20])
def test_a_tenant_with_nothing_queued_may_have_one_job_however_costly(client: redis.Redis, steps: int) -> None:
    request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": steps})  # twice as many rows
    assert accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=19)))
    with pytest.raises(TenantQuotaExceeded):
        accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=19)))


def test_a_tenant_may_fill_its_cap_exactly(client: redis.Redis) -> None:
    request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 10})  # 20 rows
    accepted(run(client, records.submit([resolve(request), resolve(request)], 600, tenant_cap=40)))
    with pytest.raises(TenantQuotaExceeded, match="has 40 rows"):
        accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=59)))
    accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=60)))


def test_a_refused_request_may_be_sent_again_under_its_key(client: redis.Redis) -> None:
    blocking = submit(client)
    request = JobRequest.parse({"prompt": "a cat", "idempotency_key": "k"})
    with pytest.raises(TenantQuotaExceeded):
        accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=10)))
    assert not client.exists(routing.idempotency_key("default", "k"))
    run(client, records.cancel(blocking, 600))
    (record,) = accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=10)))
    assert record.status is Status.QUEUED and accepted(run(client, records.submit([resolve(request)], 600, tenant_cap=10))) == [record]


def test_one_settle_one_callback(client: redis.Redis, store: Records) -> None:
    callback = {"url": "https://example.com/hook", "events": ["job.running", "job.succeeded"]}
    job_id = submit(client, callback=callback)
    claim = store.claim(job_id, "w", 30)
    assert claim
    store.settle(job_id, claim.token, Status.SUCCEEDED, images=[IMAGE])
    told, started = run(client, records.callbacks(job_id))
    assert (started["type"], started["record"].status, told["type"], told["record"].status) == (
        "job.running",
        Status.RUNNING,
        "job.succeeded",
        Status.SUCCEEDED,
    )
    assert told["record"].images == (IMAGE,) and told["seq"] > started["seq"]
    assert client.llen(routing.CALLBACK_QUEUE) == 2
    taken = store.take_callback(told["id"], 60)
    assert taken and taken["tries"] == 1 and store.take_callback(told["id"], 60) is None, "one deliverer at a time"
    store.settle_callback(told["id"], 1, {"status": 500}, "pending", 0)
    assert store.take_callback(told["id"], 60)
    store.settle_callback(told["id"], 1, {"status": 410}, "gone")  # by one that was thought lost: others have it now
    store.put_back_callback(told["id"], 1, 0)
    store.settle_callback(told["id"], 2, {"status": 200}, "delivered")
    assert store.take_callback(told["id"], 60) is None
    (again,) = [c for c in run(client, records.callbacks(job_id)) if c["id"] == told["id"]]
    assert (again["status"], [entry["status"] for entry in again["log"]]) == ("delivered", [500, 200])
    assert run(client, records.replay_callback(told["id"])) and store.take_callback(told["id"], 60)


def test_a_callback_whose_message_is_lost_is_woken(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, callback={"url": "https://example.com/hook"})
    run(client, records.cancel(job_id, 600))
    client.delete(routing.CALLBACK_QUEUE)
    client.zadd(routing.due_callbacks_key(), {f"msg_{job_id}_cancelled": 1})  # nobody has taken it for a while
    assert store.wake_callbacks() == 1 and client.llen(routing.CALLBACK_QUEUE) == 1
    assert store.wake_callbacks() == 0, "its deliverer has time to take it"


def test_a_callback_outlives_its_jobs_short_retention(client: redis.Redis) -> None:
    """Its tries go on for days."""
    store = Records(client, retention_s=60)
    job_id = submit(client, callback={"url": "https://example.com/hook"})
    run(client, records.cancel(job_id, 60))
    (told,) = run(client, records.callbacks(job_id))
    schedule_s = 4 * 86400  # and some jitter
    assert client.ttl(routing.callback_key(told["id"])) > schedule_s
    client.expire(routing.callback_key(told["id"]), 60)
    assert store.take_callback(told["id"], 60)
    store.settle_callback(told["id"], 1, {"status": 500}, "pending", 3600)
    assert client.ttl(routing.callback_key(told["id"])) > schedule_s, "each try gives the next ones their time"


@pytest.mark.parametrize(("retention_s", "kept_days"), [(60, 7), (30 * 86400, 30)])
def test_the_list_of_callbacks_is_trimmed_when_they_have_expired_and_not_before(
    client: redis.Redis, retention_s: int, kept_days: int
) -> None:
    store, day = Records(client, retention_s), 86400
    job_id = submit(client, callback={"url": "https://example.com/hook"})
    run(client, records.cancel(job_id, retention_s))
    (told,) = run(client, records.callbacks(job_id))
    client.zadd(routing.callbacks_key(), {told["id"]: seconds(client) - (kept_days - 0.5) * day})
    store.expired()
    assert [one["id"] for one in run(client, records.callbacks(job_id))] == [told["id"]]
    client.zadd(routing.callbacks_key(), {told["id"]: seconds(client) - (kept_days + 0.5) * day})
    store.expired()
    assert client.zcard(routing.callbacks_key()) == 0


def test_a_receiver_that_is_gone(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, callback={"url": "https://example.com/hook"})
    run(client, records.cancel(job_id, 600))
    (told,) = run(client, records.callbacks(job_id))
    assert store.take_callback(told["id"], 60)
    store.settle_callback(told["id"], 1, {"status": 410}, "gone")
    assert store.receiver("https://example.com/hook", "default").disabled


def test_records_and_what_belongs_to_them_expire_together(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, tenant="t")
    run(client, records.cancel(job_id, 600))
    assert store.expired() == []
    client.zadd(routing.expiring_key(), {f"t/{job_id}": 1})
    assert store.expired() == [f"t/{job_id}"]
    assert store.expired() == [], "somebody is at it"
    client.zadd(routing.expiring_key(), {f"t/{job_id}": 1})
    assert store.expired() == [f"t/{job_id}"], "again after a while, until its images are gone as well"
    store.forget([f"t/{job_id}"])
    assert store.expired() == []
    with pytest.raises(JobNotFound):
        run(client, records.get(job_id))
    assert client.zcard(routing.index_key()) == 0


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
def test_nothing_is_left_of_a_job_that_is_forgotten(client: redis.Redis, store: Records, status: Status) -> None:
    job_id = submit(client, deadline_s=600, tenant="t")
    taken_from_any(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.checkpoint(job_id, claim.token, 1, b"x")
    assert store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30, 1, ("data:,",))])
    store.settle(job_id, claim.token, status)
    client.zadd(routing.expiring_key(), {f"t/{job_id}": 1})
    store.forget(store.expired())
    assert client.keys("*") == [routing.messages_key()]


@pytest.mark.parametrize("status", list(Status))
def test_a_job_is_in_the_index_of_its_status_and_in_no_other(client: redis.Redis, store: Records, status: Status) -> None:
    job_id = submit(client)
    if status is not Status.QUEUED:
        claim = store.claim(job_id, "w", 30)
        assert claim
        if status is not Status.RUNNING:
            store.settle(job_id, claim.token, status)
    assert [one for one in Status if client.zscore(routing.index_key(one), job_id) is not None] == [status]
    assert (client.zscore(routing.waiting_key("latentline-emoji"), job_id) is not None) == (status is Status.QUEUED)
    assert (client.zscore(routing.leases_key(), job_id) is not None) == (status is Status.RUNNING)


def test_ids_of_jobs_and_callbacks_that_are_gone_are_not_looked_at_for_ever(client: redis.Redis, store: Records) -> None:
    waiting, running = submit(client), submit(client)
    store.claim(running, "w", 0.0)
    client.delete(routing.job_key(waiting), routing.job_key(running))
    client.zadd(routing.delayed_key(), {waiting: 1})
    client.zadd(routing.due_callbacks_key(), {"gone": 1})
    client.zadd(routing.callbacks_key(), {"gone": 1})
    assert store.wake("latentline-emoji", 0) == [] and store.reclaim() == [] and store.wake_callbacks() == 0
    for key in (
        routing.waiting_key("latentline-emoji"),
        routing.leases_key(),
        routing.index_key("running"),
        routing.delayed_key(),
        routing.due_callbacks_key(),
        routing.callbacks_key(),
    ):
        assert client.zcard(key) == 0, key


def test_the_lease_of_a_job_that_ended_otherwise_is_cleared(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    client.zadd(routing.leases_key(), {job_id: 1})
    assert store.reclaim() == [] and client.zcard(routing.leases_key()) == 0
    assert run(client, records.get(job_id)).status is Status.QUEUED


def test_a_record_of_another_version_is_failed_and_kept(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    request = json.loads(client.hget(routing.job_key(job_id), "request") or "{}")
    client.hset(routing.job_key(job_id), "request", json.dumps({**request, "version": 99}))
    with pytest.raises(JobNotFound, match="version cannot read"):
        store.claim(job_id, "w", 30)
    assert client.hget(routing.job_key(job_id), "status") == "failed"
    (letter,) = run(client, records.dead_letters())
    assert (letter["id"], letter["code"]) == (job_id, "unreadable_record")


def test_what_may_lose_jobs_is_told(valkey_url: str) -> None:
    client = connect(valkey_url)
    store = Records(client)
    assert [problem.split(" ")[0] for problem in store.durability()] == ["appendonly", "maxmemory"]
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert any("allkeys-lru" in problem for problem in store.durability())
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.close()


def test_a_live_lease_is_left_alone(client: redis.Redis, store: Records) -> None:
    store.claim(submit(client), "w", 30)
    assert store.reclaim() == []


def test_a_lost_job_whose_cancel_was_asked_for_is_cancelled(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    store.claim(job_id, "w", 30)
    run(client, records.cancel(job_id, 600))
    run_out(client, job_id)
    assert store.reclaim() == [job_id]
    assert run(client, records.get(job_id)).status is Status.CANCELLED


def test_nothing_to_claim(store: Records) -> None:
    with pytest.raises(JobNotFound, match="no-such-job"):
        store.claim("no-such-job", "w", 30)


def test_release_puts_it_back_with_a_fresh_wake_up(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.release(job_id, claim.token)
    record = run(client, records.get(job_id))
    assert (record.status, record.queue_position, record.worker) == (Status.QUEUED, 0, None)
    assert client.llen(queue(5)) == 2
    again = store.claim(job_id, "w", 30)
    assert again and again.token > claim.token


def test_cancel_of_a_queued_job_is_at_once(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    assert run(client, records.cancel(job_id, 600)).status is Status.CANCELLED
    assert store.claim(job_id, "w", 30) is None
    assert run(client, records.cancel(job_id, 600)).status is Status.CANCELLED
    assert kinds(client, job_id) == ["job.queued", "job.cancelled"]


def test_cancel_of_a_running_job_reaches_its_worker(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    record = run(client, records.cancel(job_id, 600))
    assert claim and record.status is Status.RUNNING and record.cancel_requested
    assert store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30)]) == [Verdict.CANCEL]
    assert 0 < client.ttl(routing.signals_key("w")) <= 60, "what nobody reads goes"
    assert store.next_signal("another", 0.01) is None
    assert store.next_signal("w", 1) == Signal(job_id, claim.token, Verdict.CANCEL)
    assert store.next_signal("w", 0.01) is None, "each is told once"


def test_only_what_runs_is_signalled(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.release(job_id, claim.token)
    run(client, records.cancel(job_id, 600))
    assert not client.exists(routing.signals_key("w"))


def test_the_worker_of_a_job_that_is_taken_away_is_told(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 0)
    assert claim and store.reclaim() == [job_id]
    assert store.next_signal("w", 1) == Signal(job_id, claim.token, Verdict.STALE)


def test_many_beats_are_split_into_calls_of_bounded_size(client: redis.Redis, store: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [store.claim(submit(client), "w", 30) for _ in range(6)]
    beats = [Beat(claim.record.id, claim.token, Phase.DENOISING, 1, 30, 1, ("x" * 1000,)) for claim in claims if claim]
    beats[4] = replace(beats[4], token=99)
    sizes: list[int] = []
    real = client.pipeline

    def pipeline(**options: Any) -> Any:
        made = real(**options)
        execute = made.execute_command
        made.execute_command = lambda *args: (sizes.append(len(args[-1])), execute(*args))[1]
        return made

    monkeypatch.setattr(client, "pipeline", pipeline)
    monkeypatch.setattr(held, "MAX_BEAT_BYTES", 4000)
    go = [Verdict.GO] * 4
    assert store.beat(beats) == [*go, Verdict.STALE, Verdict.GO]
    assert len(sizes) >= 2 and max(sizes) < 5000
    sizes.clear()
    monkeypatch.setattr(held, "MAX_BEATS", 4)
    monkeypatch.setattr(held, "MAX_BEAT_BYTES", 10**6)
    assert store.beat(beats) == [*go, Verdict.STALE, Verdict.GO] and len(sizes) == 2


def test_a_report_without_renewal_leaves_the_lease(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    before = client.hget(routing.job_key(job_id), "lease_until"), client.zscore(routing.leases_key(), job_id)
    assert claim and store.beat([Beat(job_id, claim.token, Phase.DENOISING, 2, 0)]) == [Verdict.GO]
    assert (client.hget(routing.job_key(job_id), "lease_until"), client.zscore(routing.leases_key(), job_id)) == before
    assert run(client, records.get(job_id)).step == 2


def test_a_job_whose_cancel_was_asked_for_is_not_queued_again(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    run(client, records.cancel(job_id, 600))
    assert claim and store.release(job_id, claim.token)
    assert run(client, records.get(job_id)).status is Status.CANCELLED
    assert kinds(client, job_id)[-1] == "job.cancelled"


def test_a_status_that_is_not_terminal_settles_nothing(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim
    with pytest.raises(ValueError, match="terminal"):
        store.settle(job_id, claim.token, Status.RUNNING)


def test_follow_knows_the_end(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    first, ended = run(client, records.follow(job_id, None, 1))
    assert [e.type for e in first] == ["job.queued"] and not ended
    run(client, records.cancel(job_id, 600))
    rest, ended = run(client, records.follow(job_id, first[-1].id, 1))
    assert [e.type for e in rest] == ["job.cancelled"] and ended
    assert run(client, records.follow(job_id, rest[-1].id, 60_000)) == ([], True)


def test_deadlines(client: redis.Redis, store: Records) -> None:
    waiting = submit(client, deadline_s=600)
    client.hset(routing.job_key(waiting), "deadline_at", 1)
    assert store.claim(waiting, "w", 30) is None
    record = run(client, records.get(waiting))
    assert record.error is not None and (record.status, record.error.code) == (Status.FAILED, "deadline_exceeded")
    started = submit(client, deadline_s=600)
    claim = store.claim(started, "w", 30)
    client.hset(routing.job_key(started), "deadline_at", 1)
    assert claim and store.beat([Beat(started, claim.token, Phase.DENOISING, 1, 30)]) == [Verdict.EXPIRED]


def test_a_key_and_its_record_expire_together(client: redis.Redis) -> None:
    """Also where the worker keeps records for longer, or less long, than the API says."""
    for worker_s, api_s in ((600, 60), (60, 600), (60, 60)):
        store = Records(client, retention_s=worker_s)
        request = JobRequest.parse({"prompt": "a cat", "idempotency_key": f"{worker_s}/{api_s}", "tenant": "t"})
        (record,) = accepted(run(client, records.submit([resolve(request)], api_s)))
        key = routing.idempotency_key("t", f"{worker_s}/{api_s}")
        assert client.ttl(key) > 600, "while the job waits or runs, whatever the retention"
        claim = store.claim(record.id, "w", 30)
        assert claim
        store.settle(record.id, claim.token, Status.SUCCEEDED)
        assert abs(client.pttl(key) - client.pttl(routing.job_key(record.id))) < 100
        assert worker_s - 1 <= client.ttl(key) <= worker_s


def test_a_key_whose_record_is_gone_is_free(client: redis.Redis) -> None:
    """A worker of version 0.1.0 does not shorten the key's time to live when it ends a job."""
    first = submit(client, idempotency_key="k")
    client.delete(routing.job_key(first))
    second = submit(client, idempotency_key="k", prompt="a dog")
    assert second != first and submit(client, idempotency_key="k", prompt="a dog") == second


def test_idempotency(client: redis.Redis) -> None:
    first = submit(client, idempotency_key="k")
    assert submit(client, idempotency_key="k") == first
    with pytest.raises(IdempotencyConflict, match="'k'"):
        submit(client, idempotency_key="k", prompt="a dog")
    assert submit(client, idempotency_key="k", tenant="other", prompt="a dog") != first
    assert client.llen(queue(5)) == 1


def ids_of_all_pages(client: redis.Redis, limit: int) -> list[str]:
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = run(client, records.list_jobs(cursor=cursor, limit=limit))
        seen += [record.id for record in page]
        if cursor is None:
            return seen


def test_pages_are_whole_and_without_repeats(client: redis.Redis) -> None:
    made = [submit(client) for _ in range(12)]
    seen = ids_of_all_pages(client, limit=5)
    assert sorted(seen) == sorted(made)
    times = [run(client, records.get(job_id)).created_at for job_id in seen]
    assert times == sorted(times, reverse=True)


def test_pages_skip_no_job_where_records_have_expired_between_them(client: redis.Redis) -> None:
    made = [submit(client) for _ in range(14)]
    newest_first = [record.id for record in run(client, records.list_jobs())[0]]
    gone = set(newest_first[:3] + newest_first[7:9])
    client.delete(*map(routing.job_key, gone))
    seen = ids_of_all_pages(client, limit=5)
    assert seen == [job_id for job_id in newest_first if job_id not in gone]
    assert len(seen) == len(made) - len(gone)


def test_pages_of_queued_jobs_skip_none_where_overdue_ones_are_failed_between_them(client: redis.Redis) -> None:
    made = [submit(client, deadline_s=600) for _ in range(14)]
    newest_first = [record.id for record in run(client, records.list_jobs())[0]]
    overdue = set(newest_first[:3] + newest_first[7:9])
    for job_id in overdue:
        passed(client, job_id)
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = run(client, records.list_jobs(Status.QUEUED, cursor, limit=5))
        seen += [record.id for record in page]
        if cursor is None:
            break
    assert seen == [job_id for job_id in newest_first if job_id not in overdue]
    assert len(seen) == len(made) - len(overdue)


def test_list_by_status_and_without_expired_records(client: redis.Redis, store: Records) -> None:
    gone, queued, running = submit(client), submit(client), submit(client)
    store.claim(running, "w", 30)
    client.delete(routing.job_key(gone))
    assert [r.id for r in run(client, records.list_jobs(Status.QUEUED))[0]] == [queued]
    assert [r.id for r in run(client, records.list_jobs(Status.RUNNING))[0]] == [running]
    assert {r.id for r in run(client, records.list_jobs())[0]} == {queued, running}
    assert client.zscore(routing.index_key(), gone) is None


@pytest.mark.parametrize("cursor", ["!", "bm90LWEtY3Vyc29y", "MTIz"])
def test_a_bad_cursor(client: redis.Redis, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        run(client, records.list_jobs(cursor=cursor))


@pytest.mark.parametrize("limit", [0, 201])
def test_a_bad_limit(client: redis.Redis, limit: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 200"):
        run(client, records.list_jobs(limit=limit))


def test_events_resume_after_an_id(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    store.claim(job_id, "w", 30)
    first, second = run(client, records.events(job_id))
    assert [e.id for e in run(client, records.events(job_id, first.id))] == [second.id]
    assert run(client, records.events(job_id, second.id)) == []
    with pytest.raises(InvalidRequest, match="last_event_id"):
        run(client, records.events(job_id, "yesterday"))


def test_unknown_ids(client: redis.Redis) -> None:
    for operation in (records.get("x"), records.cancel("x", 600), records.events("x")):
        with pytest.raises(JobNotFound):
            run(client, operation)  # type: ignore[arg-type]


def test_models_and_workers(client: redis.Redis, store: Records) -> None:
    info = ModelInfo(id="m", family="sd", default_width=64, default_height=64, max_pixels=4096)
    store.announce("cpu@a", [info])
    assert run(client, records.models()) == {"m": info}
    assert run(client, records.workers()) == ["cpu@a"]
    store.worker_gone("cpu@a")
    assert run(client, records.workers()) == []


def test_a_worker_that_says_nothing_vanishes_and_its_name_goes(client: redis.Redis, store: Records) -> None:
    info = ModelInfo(id="m", family="sd", default_width=64, default_height=64, max_pixels=4096)
    for name in ("silent", "forgotten"):
        store.announce(name, [info])
    client.zadd(routing.workers_key(), {"silent": seconds(client) - 12, "forgotten": seconds(client) - 3700})
    store.announce("alive", [info])
    assert run(client, records.workers()) == ["alive"]
    assert set(client.zrange(routing.workers_key(), 0, -1)) == {"alive", "silent"}


def test_a_settled_failure_tells_why(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim
    error = JobError(code="numerical_error", message="not finite")
    assert store.settle(job_id, claim.token, Status.FAILED, error=error).error == error
    assert run(client, records.events(job_id))[-1].data["error"]["code"] == "numerical_error"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NOREPLICAS Not enough good replicas to write.", "NOREPLICAS"),
        ("BUSY Valkey is busy running a script.", "BUSY"),
        ("WRONGTYPE Operation against a key of alice@10.0.0.7", "WRONGTYPE"),
        ("user_script:12: attempt to index a nil value of alice@10.0.0.7", "ResponseError"),
    ],
)
def test_whatever_the_broker_refuses_is_a_domain_error_without_its_text(client: redis.Redis, text: str, code: str) -> None:
    def refused() -> records.Operation[None]:
        def call(_: object) -> None:
            raise redis.ResponseError(text)

        yield call

    with pytest.raises(BrokerUnavailable, match=f": {code}$"):
        run(client, refused())


@pytest.mark.parametrize("error", [redis.exceptions.ClusterDownError("down"), redis.exceptions.MasterDownError("no link")])
def test_a_broker_without_its_primary_is_unavailable(client: redis.Redis, error: redis.ResponseError) -> None:
    def refused() -> records.Operation[None]:
        def call(_: object) -> None:
            raise error

        yield call

    with pytest.raises(BrokerUnavailable, match=type(error).__name__):
        run(client, refused())


def test_a_dead_broker_is_an_error_in_both_worlds() -> None:
    url = "redis://127.0.0.1:1/0"  # nothing listens there
    with pytest.raises(BrokerUnavailable):
        run(connect(url), records.get("x"))

    async def ask() -> None:
        client = connect_async(url)
        try:
            await arun(client, records.get("x"))
        finally:
            await client.aclose()

    with pytest.raises(BrokerUnavailable):
        asyncio.run(ask())
