"""Many listeners on one connection: nothing missed, nothing twice, and an end for everybody when something fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
import redis
from support.jobs import submit

from latentline import event_reader, records, routing
from latentline.connection import connect, connect_async
from latentline.errors import BrokerUnavailable, InvalidRequest, JobNotFound
from latentline.event_reader import EventReader
from latentline.jobs import Phase, Status
from latentline.records import Beat, Records

PATIENCE_S = 60.0  # how long a test waits for an event before it fails; no test measures time


@pytest.fixture
def store(empty_valkey: redis.Redis) -> Iterator[Records]:
    yield Records(empty_valkey, 600)


def run_job(store: Records, job_id: str, steps: int = 2) -> None:
    """A job's whole life after its submission."""
    claim = store.claim(job_id, "one", 30)
    assert claim is not None
    for step in range(1, steps + 1):
        store.beat([Beat(job_id, claim.token, Phase.DENOISING, step, 30)])
    store.settle(job_id, claim.token, Status.SUCCEEDED)


STORY = ["job.queued", "job.running", "job.progress", "job.progress", "job.succeeded"]


@contextlib.asynccontextmanager
async def reading(url: str) -> AsyncIterator[EventReader]:
    client = connect_async(url)
    reader = EventReader(client)
    yield reader
    await reader.close()
    await client.aclose()


async def story(reader: EventReader, job_id: str, ready: asyncio.Event | None = None, last: str | None = None) -> list[tuple[str, str]]:
    """(id, type) of every event that a listener gets until the job's last one."""
    got: list[tuple[str, str]] = []
    async with reader.listen({job_id: last}) as listener:
        while not listener.ended:
            got += [(event.id, event.type) for event in await listener.next(PATIENCE_S)]
            if ready:
                ready.set()
    return got


def num_connections(client: redis.Redis) -> int:
    return int(cast(dict[str, Any], client.info("clients"))["connected_clients"])


def test_three_hundred_listeners_share_a_connection_and_miss_nothing(empty_valkey: redis.Redis, store: Records, valkey_url: str) -> None:
    ids = submit(empty_valkey, 30)
    before = num_connections(empty_valkey)

    async def listen() -> tuple[list[list[tuple[str, str]]], int]:
        async with reading(valkey_url) as reader:
            tasks, opened = [], []
            for i in range(300):
                opened.append(asyncio.Event())
                tasks.append(asyncio.create_task(story(reader, ids[i % 30], opened[-1])))
                if i % 50 == 49:  # not all at the same moment, which would need a connection for each first read
                    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in opened)), PATIENCE_S)
            while num_connections(empty_valkey) > before + 60:
                await asyncio.sleep(0.01)
            await reader._client.connection_pool.disconnect(inuse_connections=False)
            connections = num_connections(empty_valkey) - before
            for job_id in ids:
                await asyncio.to_thread(run_job, store, job_id)
            stories = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
            return stories, connections

    stories, connections = asyncio.run(listen())
    assert connections <= 2, "one that waits; another may just be ringing"
    for told in stories:
        assert [kind for _, kind in told] == STORY
        assert len({event_id for event_id, _ in told}) == len(told)


def test_who_comes_later_gets_what_was_before_and_no_event_twice(empty_valkey: redis.Redis, store: Records, valkey_url: str) -> None:
    (job_id,) = submit(empty_valkey)
    claim = store.claim(job_id, "one", 30)
    assert claim is not None

    async def listen() -> list[list[tuple[str, str]]]:
        async with reading(valkey_url) as reader:
            tasks = []
            for step in range(1, 21):  # a listener between any two events
                ready = asyncio.Event()
                tasks.append(asyncio.create_task(story(reader, job_id, ready)))
                store.beat([Beat(job_id, claim.token, Phase.DENOISING, step, 30)])
                await asyncio.wait_for(ready.wait(), PATIENCE_S)
            store.settle(job_id, claim.token, Status.SUCCEEDED)
            stories = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
            resumed = await story(reader, job_id, last=stories[0][5][0])
            return [*stories, [*stories[0][:6], *resumed]]

    stories = asyncio.run(listen())
    assert [kind for _, kind in stories[0]] == ["job.queued", "job.running", *["job.progress"] * 20, "job.succeeded"]
    assert all(told == stories[0] for told in stories)


def test_bad_ids_and_unknown_jobs_are_refused_at_once(empty_valkey: redis.Redis, valkey_url: str) -> None:
    (job_id,) = submit(empty_valkey)

    async def listen() -> None:
        async with reading(valkey_url) as reader:
            with pytest.raises(JobNotFound):
                async with reader.listen({"no such job": None}):
                    pass
            with pytest.raises(InvalidRequest):
                async with reader.listen({job_id: "x"}):
                    pass
            assert not reader.jobs, "nothing is left of them"

    asyncio.run(listen())


def test_a_record_that_goes_ends_its_listeners(empty_valkey: redis.Redis, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_reader, "BLOCK_MS", 10)
    monkeypatch.setattr(event_reader, "CHECK_S", 0.0)
    gone, stays = submit(empty_valkey, 2)

    async def listen() -> None:
        async with reading(valkey_url) as reader, reader.listen({gone: None}) as first, reader.listen({stays: None}) as second:
            assert await first.next(PATIENCE_S) and await second.next(PATIENCE_S)
            empty_valkey.delete(routing.job_key(gone), routing.events_key(gone))
            with pytest.raises(JobNotFound):
                await first.next(PATIENCE_S)
            assert records.run(empty_valkey, records.cancel(stays, 600)).status is Status.CANCELLED
            assert [event.type for event in await second.next(PATIENCE_S)] == ["job.cancelled"] and second.ended

    asyncio.run(listen())


def test_a_broker_that_fails_ends_every_listener_and_the_next_one_begins_anew(empty_valkey: redis.Redis, valkey_url: str) -> None:
    first_id, second_id = submit(empty_valkey, 2)

    async def listen() -> None:
        async with reading(valkey_url) as reader:
            async with reader.listen({first_id: None}) as first, reader.listen({second_id: None}) as second:
                assert await first.next(PATIENCE_S) and await second.next(PATIENCE_S)
                other = connect(valkey_url)
                while not any(one["cmd"] == "xread" and "b" in one["flags"] for one in other.client_list()):
                    await asyncio.sleep(0.01)  # until the shared read waits at the broker
                other.client_kill_filter(_type="normal", skipme=True)
                other.close()
                for listener in (first, second):
                    with pytest.raises(BrokerUnavailable):
                        await listener.next(PATIENCE_S)
            async with reader.listen({first_id: None}) as again:
                assert [event.type for event in await again.next(PATIENCE_S)] == ["job.queued"]

    asyncio.run(listen())


def test_a_listener_whose_first_read_was_made_early_and_ends_late_misses_nothing(
    empty_valkey: redis.Redis, store: Records, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = submit(empty_valkey)
    held, go = asyncio.Event(), asyncio.Event()
    arun = event_reader.arun
    reads = 0

    async def slow(client: Any, operation: Any) -> Any:
        nonlocal reads
        found = await arun(client, operation)
        if operation.gi_code.co_name == "follow_many":
            reads += 1
            if reads == 1:  # the first listener's read was answered, and it does not learn of it yet
                held.set()
                await go.wait()
        return found

    monkeypatch.setattr(event_reader, "arun", slow)

    async def listen() -> list[list[tuple[str, str]]]:
        async with reading(valkey_url) as reader:
            first = asyncio.create_task(story(reader, job_id))
            await asyncio.wait_for(held.wait(), PATIENCE_S)
            claim = store.claim(job_id, "one", 30)
            assert claim is not None
            ready = asyncio.Event()
            second = asyncio.create_task(story(reader, job_id, ready))
            await asyncio.wait_for(ready.wait(), PATIENCE_S)
            go.set()
            store.beat([Beat(job_id, claim.token, Phase.DENOISING, 1, 30)])
            store.settle(job_id, claim.token, Status.SUCCEEDED)
            return list(await asyncio.wait_for(asyncio.gather(first, second), PATIENCE_S))

    first, second = asyncio.run(listen())
    assert first == second and [kind for _, kind in first] == ["job.queued", "job.running", "job.progress", "job.succeeded"]
