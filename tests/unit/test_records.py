"""Records: one conformance suite, run against fakeredis and against a real Valkey."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis
from support.jobs import accepted

from latentline import records, routing
from latentline.connection import connect, connect_async
from latentline.errors import BrokerUnavailable, IdempotencyConflict, InvalidRequest, JobNotFound, StaleToken, TenantQuotaExceeded
from latentline.jobs import ImageRef, JobError, JobRequest, ModelInfo, Phase, Status
from latentline.records import Backoff, Beat, Records, Verdict, arun, run

BACKOFF = Backoff(first_s=60, most_s=1000, jitter=0.5)
IMAGE = ImageRef(key="t/j/1/0.png", seed=1, width=64, height=64, content_type="image/png", sha256="0" * 64, num_bytes=3)


@pytest.fixture(params=["fakeredis", "valkey"])
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    if request.param == "fakeredis":
        yield fakeredis.FakeRedis(decode_responses=True)
        return
    real = connect(request.getfixturevalue("valkey_url"))
    real.flushall()
    yield real
    real.close()


@pytest.fixture
def store(client: redis.Redis) -> Records:
    return Records(client, retention_s=600)


def submit(client: redis.Redis, **fields: Any) -> str:
    request = JobRequest.parse({"prompt": "a cat", **fields})
    return accepted(run(client, records.submit([request], 600)))[0].id


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
    running = store.get(job_id)
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
        assert store.get(job_id).status is Status.QUEUED
    assert store.suspect(job_id)
    lose(client, store, job_id, alone=True)
    assert store.get(job_id).status is Status.QUEUED
    lose(client, store, job_id, alone=True)
    record = store.get(job_id)
    assert record.error is not None and (record.status, record.error.code) == (Status.FAILED, "worker_lost")
    assert [letter["job_id"] for letter in run(client, records.dead_letters())] == [job_id]
    assert store.reclaim() == []


def test_a_job_that_gets_further_in_each_life_is_not_what_kills_its_workers(client: redis.Redis, store: Records) -> None:
    """Workers that are killed from outside, over and over, cost it time and nothing else."""
    job_id = submit(client)
    for step in range(1, 10):
        lose(client, store, job_id, alone=True, at=step)
    assert store.get(job_id).status is Status.QUEUED and not store.suspect(job_id)
    for _ in range(2):  # the same step over and over is another matter
        lose(client, store, job_id, alone=True, at=9)
    assert store.get(job_id).status is Status.FAILED


def test_what_kills_its_workers_at_one_step_ends_after_five_of_them(client: redis.Redis, store: Records) -> None:
    """Wherever its checkpoints let each life begin."""
    job_id = submit(client)
    lives = 0
    while store.get(job_id).status is Status.QUEUED:
        alone = store.suspect(job_id)
        claim = store.claim(job_id, "w", 30, alone=alone)
        assert claim and claim.record.step == lives
        lives += 1
        assert store.checkpoint(job_id, claim.token, lives, b"state")
        store.beat([Beat(job_id, claim.token, Phase.DENOISING, 12, 30)])
        run_out(client, job_id)
        assert store.reclaim() == [job_id]
    error = store.get(job_id).error
    assert (lives, error and error.code) == (5, "worker_lost")


def test_company_in_a_crash_is_never_a_reason_to_fail(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    for _ in range(10):
        lose(client, store, job_id, alone=False)
    assert store.get(job_id).status is Status.QUEUED


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


def test_a_checkpoint_is_kept_for_the_next_owner_and_fenced(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    data = bytes(range(256)) * 40
    old = store.claim(job_id, "w", 30)
    assert old and store.load_checkpoint(job_id) is None
    assert store.checkpoint(job_id, old.token, 7, data)
    assert store.release(job_id, old.token)
    assert store.get(job_id).step == 7
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
    accepted = [record.id for record in run(client, records.submit(requests, 600))]
    client.delete(queue(5))
    assert set(store.wake("latentline-emoji", 0)) == set(accepted[: records.MAX_WAKE])
    assert set(store.wake("latentline-emoji", 0)) == set(accepted[records.MAX_WAKE :])
    assert client.llen(queue(5)) == len(accepted)
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
    assert {letter["id"] for letter in run(client, records.dead_letters())} == {"newer", "newest"}
    monkeypatch.setattr("latentline.records.worker.DEAD_MOST", 1)
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


def test_a_tenants_cap(client: redis.Redis, store: Records) -> None:
    def give(tenant: str) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 10, "tenant": tenant})  # 20 rows
        return accepted(run(client, records.submit([request], 600, tenant_cap=50)))[0].id

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
    assert store.get(second).status is Status.CANCELLED


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
    store.expired()
    assert [one["id"] for one in run(client, records.callbacks(job_id))] == [told["id"]]


def test_a_receiver_that_is_gone(client: redis.Redis, store: Records) -> None:
    job_id = submit(client, callback={"url": "https://example.com/hook"})
    run(client, records.cancel(job_id, 600))
    (told,) = run(client, records.callbacks(job_id))
    assert store.take_callback(told["id"], 60)
    store.settle_callback(told["id"], 1, {"status": 410}, "gone")
    assert store.receiver_disabled("https://example.com/hook")


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
        store.get(job_id)
    assert client.zcard(routing.index_key()) == 0


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
    assert store.get(job_id).status is Status.CANCELLED


def test_nothing_to_claim(store: Records) -> None:
    with pytest.raises(JobNotFound, match="no-such-job"):
        store.claim("no-such-job", "w", 30)


def test_release_puts_it_back_with_a_fresh_wake_up(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim and store.release(job_id, claim.token)
    record = store.get(job_id)
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


def test_a_job_whose_cancel_was_asked_for_is_not_queued_again(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    run(client, records.cancel(job_id, 600))
    assert claim and store.release(job_id, claim.token)
    assert store.get(job_id).status is Status.CANCELLED
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
    record = store.get(waiting)
    assert record.error is not None and (record.status, record.error.code) == (Status.FAILED, "deadline_exceeded")
    started = submit(client, deadline_s=600)
    claim = store.claim(started, "w", 30)
    client.hset(routing.job_key(started), "deadline_at", 1)
    assert claim and store.beat([Beat(started, claim.token, Phase.DENOISING, 1, 30)]) == [Verdict.EXPIRED]


def test_idempotency(client: redis.Redis) -> None:
    first = submit(client, idempotency_key="k")
    assert submit(client, idempotency_key="k") == first
    with pytest.raises(IdempotencyConflict, match="'k'"):
        submit(client, idempotency_key="k", prompt="a dog")
    assert submit(client, idempotency_key="k", tenant="other", prompt="a dog") != first
    assert client.llen(queue(5)) == 1


def test_pages_are_whole_and_without_repeats(client: redis.Redis) -> None:
    made = [submit(client) for _ in range(12)]
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = run(client, records.list_jobs(cursor=cursor, limit=5))
        seen += [record.id for record in page]
        if cursor is None:
            break
    assert sorted(seen) == sorted(made)
    times = [run(client, records.get(job_id)).created_at for job_id in seen]
    assert times == sorted(times, reverse=True)


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
    store.announce("cpu@a", info)
    assert store.models() == {"m": info}
    assert store.workers() == ["cpu@a"]
    store.worker_gone("cpu@a")
    assert store.workers() == []


def test_a_settled_failure_tells_why(client: redis.Redis, store: Records) -> None:
    job_id = submit(client)
    claim = store.claim(job_id, "w", 30)
    assert claim
    error = JobError(code="numerical_error", message="not finite")
    assert store.settle(job_id, claim.token, Status.FAILED, error=error).error == error
    assert run(client, records.events(job_id))[-1].data["error"]["code"] == "numerical_error"


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
