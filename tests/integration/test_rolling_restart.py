"""Two API processes are restarted one after the other, under listeners and polls: no event is lost, none comes twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from support.apis import PATIENCE_S, Apis, Follower
from support.jobs import submit

from latentline.jobs import Claim, ImageRef, Phase, Status
from latentline.records import Beat, Records

STEPS = 12  # of each job: three parts, with a restart between two of them
IMAGE = ImageRef(key="default/job/1/0.png", seed=1, width=64, height=64, content_type="image/png", sha256="0" * 64, num_bytes=4096)


@pytest.fixture
def apis(empty_valkey: redis.Redis, valkey_url: str, tmp_path: Path) -> Iterator[Apis]:
    running = Apis(tmp_path, valkey_url)
    try:
        running.start()
        running.start()
        yield running
    finally:
        running.close()


class Jobs:
    """Jobs that the test runs, a few steps at a time."""

    def __init__(self, client: redis.Redis, ids: list[str]) -> None:
        self.records, self.ids = Records(client, 600), ids
        self._claims: list[Claim] = []

    def start(self) -> None:
        for job_id in self.ids:
            claim = self.records.claim(job_id, "one", 600)
            assert claim is not None
            self._claims.append(claim)

    def advance(self, steps: range) -> None:
        for step in steps:
            self.records.beat([Beat(claim.record.id, claim.token, Phase.DENOISING, step, 600) for claim in self._claims])

    def finish(self) -> None:
        for claim in self._claims:
            self.records.settle(claim.record.id, claim.token, Status.SUCCEEDED, images=[IMAGE])


async def poll(apis: Apis, http: httpx.AsyncClient, job_id: str, seen: list[int]) -> None:
    """Ask for a job without a pause, through the processes in turn, until it has ended."""
    turn = 0
    while True:
        turn += 1
        with contextlib.suppress(httpx.TransportError):
            answer = await http.get(f"{apis.urls[turn % len(apis.urls)]}/v1/jobs/{job_id}", params={"wait": turn % 2})
            assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
            seen.append(answer.json()["step"])
            if answer.json()["status"] == "succeeded":
                return
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def clients() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=httpx.Timeout(PATIENCE_S), limits=limits, trust_env=False) as http:
        yield http


def test_nothing_is_lost_and_nothing_comes_twice_while_both_processes_are_restarted(apis: Apis, empty_valkey: redis.Redis) -> None:
    ids = submit(empty_valkey, 10, num_inference_steps=STEPS)
    jobs = Jobs(empty_valkey, ids)
    before = list(apis.urls)

    async def restart(url: str) -> None:
        await asyncio.to_thread(apis.stop, url)
        await asyncio.to_thread(apis.start)

    async def run() -> tuple[list[Follower], list[list[int]]]:
        async with clients() as http:
            followers = [Follower(apis, http, ids[i % 6 : i % 6 + 5], first=i) for i in range(30)]
            seen: list[list[int]] = [[] for _ in ids]
            tasks = [asyncio.create_task(follower.run()) for follower in followers]
            tasks += [asyncio.create_task(poll(apis, http, job_id, steps)) for job_id, steps in zip(ids, seen, strict=True)]
            await asyncio.wait_for(asyncio.gather(*(follower.ready.wait() for follower in followers)), PATIENCE_S)
            await asyncio.to_thread(jobs.start)
            for part, url in enumerate(before):
                stopping = asyncio.create_task(restart(url))
                for step in range(1, 5):  # while the process stops and another one starts
                    await asyncio.to_thread(jobs.advance, range(4 * part + step, 4 * part + step + 1))
                    await asyncio.sleep(0.5)
                await stopping
            await asyncio.to_thread(jobs.advance, range(9, STEPS + 1))
            await asyncio.to_thread(jobs.finish)
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
            return followers, seen

    followers, seen = asyncio.run(run())
    whole = ["job.queued", "job.running", *["job.progress"] * STEPS, "job.succeeded"]
    for i, follower in enumerate(followers):
        for job_id in ids[i % 6 : i % 6 + 5]:
            told = [(seq, kind) for job, seq, kind in follower.told if job == job_id]
            assert told == list(enumerate(whole, 1)), f"listener {i}, {follower.connections}"
    assert all(steps == sorted(steps) and steps[-1] == STEPS for steps in seen), "no poll went back in time"
    assert not set(before) & set(apis.urls), "both processes were replaced"
    assert {url for follower in followers for url in follower.connections} > set(before), "and the new ones served streams"
