"""What happened to a job, as workers tell of their attempts and as readers get it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any, cast

import fakeredis
import pytest
from support.live_api import live_api
from support.stubs import FAMILY

from latentline import Settings, records, routing
from latentline.errors import JobNotFound
from latentline.jobs import Claim, JobError, JobRequest, Phase, Status, resolve
from latentline.keys import NewKey
from latentline.provenance import LoraFile, Made
from latentline.records import Backoff, Beat, Records
from latentline.timeline import (
    MAX_ACCOUNT_BYTES,
    MAX_ATTEMPTS,
    MAX_BESIDE,
    MAX_CALLBACKS,
    MAX_CHECKPOINTS,
    MAX_RUNS,
    MAX_TIMELINE_BYTES,
    Account,
    Run,
    Timeline,
)
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.request import Request, Step, Work
from latentline_worker.generate.account import account_of
from latentline_worker.generate.leased_job import LeasedJob
from latentline_worker.generate.making import made_with

MADE = Made(weights="w" * 64, dtype="float32", sampler="s" * 64, versions={"torch": "2"}, device="cpu")
HOOK = "https://hooks.example/done"


class Bench:
    """Records on a fake broker; two workers as a test plays them."""

    def __init__(self) -> None:
        self.redis = fakeredis.FakeRedis(decode_responses=True)
        self.records = Records(self.redis)

    def submit(self, **fields: Any) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 4, "seed": 1, **fields})
        return records.run(self.redis, records.submit([resolve(request)], 600))[0].id

    def claim(self, job_id: str, worker: str = "one") -> Claim:
        found = self.records.claim(job_id, worker, 30)
        assert found is not None
        return found

    def report(self, claim: Claim, phase: Phase, step: int, jobs: int = 1) -> None:
        self.records.beat([Beat(claim.record.id, claim.token, phase, step, lease_s=30, batch_jobs=jobs)])

    def lose(self, job_id: str) -> None:
        """Its lease runs out."""
        self.redis.hset(routing.job_key(job_id), "lease_until", "1")
        records.run(self.redis, records.driving.call_script(records.maintenance.RECLAIM, id=job_id, max_crashes_alone=2, retention_s=600))

    def timeline(self, job_id: str, tenant: str | None = None) -> Timeline:
        return records.run(self.redis, records.timeline(job_id, tenant))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def account(**fields: Any) -> str:
    return Account(**{"made": MADE, **fields}).to_json()


def test_a_settled_job_tells_its_phases_steps_and_what_made_it(bench: Bench) -> None:
    job_id = bench.submit()
    claim = bench.claim(job_id)
    spans = {"denoising": (120, 300), "encoding": (20, 100), "decoding": (420, 30), "uploading": (450, 5)}
    runs = (Run(1, 1, 2, 120, (50.25, 51.0)), Run(3, 3, 6, 230, (80.0, None)))
    bench.records.settle(
        job_id,
        claim.token,
        Status.SUCCEEDED,
        account=account(spans=spans, runs=runs, num_checkpoints=1, checkpoints=((2, 240),), beside=("other",)),
    )
    found = bench.timeline(job_id)
    (one,) = found.attempts
    assert (found.status, found.num_attempts, one.outcome, one.worker, one.worker_name) == ("succeeded", 1, "succeeded", 1, "one")
    assert [span.name for span in one.phases] == ["encoding", "denoising", "decoding", "uploading"]
    assert one.phases[1].start_s == pytest.approx(one.claimed_s + 0.12, abs=1e-3) and one.phases[1].duration_s == 0.3
    assert [(run.first, run.count, run.jobs, run.rows, run.durations_ms) for run in one.steps] == [
        (1, 2, 1, 2, [50.25, 51.0]),
        (3, 2, 3, 6, [80.0, None]),
    ]
    assert (one.num_checkpoints, one.checkpoints[0].step, one.made, one.shared_with) == (1, 2, MADE, ["other"])
    assert found.queued_s == one.claimed_s >= one.queued_s == 0
    assert found.ended_s is not None and one.ended_s == pytest.approx(found.ended_s, abs=1e-3)


def test_names_of_workers_and_other_jobs_are_not_for_owners(bench: Bench) -> None:
    job_id = bench.submit()
    bench.records.settle(
        job_id, bench.claim(job_id, "gpu0@secret-host:12").token, Status.SUCCEEDED, account=account(beside=("foreign-job",))
    )
    full = bench.timeline(job_id)
    shown = full.for_owner()
    assert "secret-host" in full.model_dump_json() and "foreign-job" in full.model_dump_json()
    assert "secret-host" not in shown.model_dump_json() and "foreign-job" not in shown.model_dump_json()
    assert shown.attempts[0].worker == 1 and shown.attempts[0].made == MADE


def test_an_attempt_whose_worker_was_lost_is_told_by_its_reports_and_goes_on_at_another(bench: Bench) -> None:
    job_id = bench.submit(num_inference_steps=10)
    first = bench.claim(job_id)
    for phase, step, jobs in ((Phase.ENCODING, 0, 0), (Phase.DENOISING, 0, 1), (Phase.DENOISING, 3, 1), (Phase.DENOISING, 6, 2)):
        bench.report(first, phase, step, jobs)
    bench.records.checkpoint(job_id, first.token, 5, b"history")
    bench.lose(job_id)
    second = bench.claim(job_id, "two")
    bench.records.settle(job_id, second.token, Status.SUCCEEDED, account=account(resumed_from=5))
    lost, last = bench.timeline(job_id).attempts
    assert (lost.outcome, lost.worker, last.outcome, last.worker, last.resumed_from) == ("lost", 1, "succeeded", 2, 5)
    assert [span.name for span in lost.phases] == ["encoding", "denoising"]
    assert [(run.first, run.count, run.jobs, run.rows, run.durations_ms) for run in lost.steps] == [
        (1, 3, 1, None, []),
        (4, 3, 2, None, []),
    ]
    assert lost.ended_s is not None and lost.claimed_s <= lost.ended_s <= last.queued_s + 1e-3 <= last.claimed_s + 1e-3


def test_errors_and_shutdowns_are_told_apart(bench: Bench) -> None:
    job_id = bench.submit()
    bench.records.release(job_id, bench.claim(job_id).token, account(resumed_from=0))
    bench.records.retry(job_id, bench.claim(job_id, "two").token, JobError(code="x", message="y"), Backoff(0, 0), account())
    bench.redis.delete(routing.delayed_key())
    bench.claim(job_id)
    found = bench.timeline(job_id)
    assert [(one.number, one.outcome, one.worker) for one in found.attempts] == [(1, "handed_over", 1), (2, "error", 2), (3, "running", 1)]
    assert found.attempts[0].made == found.attempts[1].made == MADE and found.attempts[2].ended_s is None


def test_a_job_that_waits_or_ends_in_the_queue_has_waited_until_then(bench: Bench) -> None:
    job_id = bench.submit()
    time.sleep(0.02)
    waiting = bench.timeline(job_id)
    assert waiting.attempts == [] and waiting.queued_s == pytest.approx(waiting.now_s, abs=1e-3) and waiting.queued_s >= 0.01
    records.run(bench.redis, records.cancel(job_id, 600))
    ended = bench.timeline(job_id)
    assert ended.status == "cancelled" and ended.queued_s == pytest.approx(ended.ended_s, abs=1e-3)


def test_callbacks_show_their_tries(bench: Bench) -> None:
    job_id = bench.submit(callback={"url": HOOK, "events": ["job.running", "job.succeeded"]})
    bench.records.settle(job_id, bench.claim(job_id).token, Status.SUCCEEDED, account=account())
    taken = bench.records.take_callback(f"msg_{job_id}_succeeded", 30)
    assert taken is not None
    bench.records.settle_callback(taken["id"], taken["tries"], {"at": time.time(), "try": 1, "result": "status 503"}, "pending", 5)
    running, done = bench.timeline(job_id).callbacks
    assert (running.event, running.status, running.tries) == ("job.running", "pending", [])
    assert (done.event, done.status, done.num_tries, done.tries[0].result) == ("job.succeeded", "pending", 1, "status 503")
    assert done.due_s is not None and done.due_s > done.at_s


def test_no_callback_of_another_event_is_looked_for(bench: Bench) -> None:
    job_id = bench.submit(callback={"url": HOOK, "events": ["job.failed"]})
    bench.records.settle(job_id, bench.claim(job_id).token, Status.SUCCEEDED)
    assert bench.timeline(job_id).callbacks == []


def test_a_job_of_another_tenant_and_one_that_is_gone_are_not_found(bench: Bench) -> None:
    job_id = bench.submit(tenant="ann")
    assert bench.timeline(job_id, "ann").job_id == job_id
    with pytest.raises(JobNotFound) as foreign:
        bench.timeline(job_id, "bob")
    bench.redis.delete(routing.job_key(job_id))
    with pytest.raises(JobNotFound) as gone:
        bench.timeline(job_id)
    assert foreign.value.message == gone.value.message


def test_followers_of_the_events_are_not_given_the_account(bench: Bench) -> None:
    job_id = bench.submit()
    bench.records.settle(job_id, bench.claim(job_id).token, Status.SUCCEEDED, account=account())
    told = records.run(bench.redis, records.events(job_id))
    assert told[-1].type == "job.succeeded" and "w" * 64 not in repr(told)
    assert "account" not in bench.redis.hgetall(routing.job_key(job_id)), "a poll does not carry it"


@pytest.mark.parametrize("kept", ["", "?", '{"runs": 1}', '{"spans": {"denoising": ["a", 1]}}'])
def test_an_account_that_cannot_be_read_leaves_what_the_events_tell(bench: Bench, kept: str) -> None:
    job_id = bench.submit()
    claim = bench.claim(job_id)
    bench.report(claim, Phase.DENOISING, 4)
    bench.records.settle(job_id, claim.token, Status.SUCCEEDED, account=kept)
    (one,) = bench.timeline(job_id).attempts
    assert one.outcome == "succeeded" and [(run.first, run.count) for run in one.steps] == [(1, 4)] and one.made is None


def largest() -> Account:
    """An account at all of its bounds."""
    runs = tuple(Run(1 + 5 * i, 999, 9999, 9_999_999, (99999.99,) * 5) for i in range(MAX_RUNS))
    spans = dict.fromkeys(("encoding", "waiting", "denoising", "decoding", "uploading"), (9999999, 9999999))
    loras = (LoraFile(name="n" * 100, sha256="f" * 64),) * 8
    versions = dict.fromkeys(("latentline", "torch", "diffusers", "pillow"), "v" * 30)
    return Account(
        spans=spans,
        resumed_from=299,
        runs=runs,
        num_checkpoints=9999,
        checkpoints=((300, 9_999_999),) * MAX_CHECKPOINTS,
        beside=("12345678-1234-1234-1234-123456789012",) * MAX_BESIDE,
        made=MADE.model_copy(update={"loras": loras, "versions": versions}),
    )


def test_the_largest_account_and_the_largest_timeline_keep_their_bounds(bench: Bench) -> None:
    text = largest().to_json()
    assert 4000 < len(text) <= MAX_ACCOUNT_BYTES and Account.read(text) is not None
    longer = largest().model_copy(update={"runs": largest().runs * 4})
    assert len(longer.to_json()) <= MAX_ACCOUNT_BYTES and Account.read(longer.to_json()) is not None, "it does without its runs"
    job_id = bench.submit(callback={"url": HOOK, "events": ["job.running", "job.succeeded"]})
    for number in range(MAX_CALLBACKS + MAX_ATTEMPTS):
        claim = bench.claim(job_id, f"{number} " + "h" * 200)
        bench.redis.hset(
            routing.callback_key(f"msg_{job_id}_running_{claim.record.attempt}"),
            "log",
            json.dumps([{"at": time.time(), "try": 9, "result": "r" * 300}] * 20),
        )
        if number < MAX_CALLBACKS + MAX_ATTEMPTS - 1:
            bench.records.release(job_id, claim.token, text)
    bench.records.settle(job_id, claim.token, Status.SUCCEEDED, account=text)
    found = bench.timeline(job_id)
    assert (len(found.attempts), found.num_attempts, len(found.callbacks)) == (MAX_ATTEMPTS, MAX_CALLBACKS + MAX_ATTEMPTS, MAX_CALLBACKS)
    assert [one.number for one in found.attempts][-1] == found.num_attempts
    assert 40_000 < len(found.model_dump_json()) <= MAX_TIMELINE_BYTES


# What a worker makes of its steps


def leased(bench: Bench, steps: list[Step], resumed_from: int = 0, **fields: Any) -> tuple[LeasedJob, Request]:
    claim = bench.claim(bench.submit(**fields))
    work = Work.of(FAMILY, claim.record.request.model_copy(update={"scheduler": "ddim"}), claim.record.id)
    if resumed_from:
        work = replace(work, resume=Checkpoint(resumed_from, cast(Any, None)))
    job, request = LeasedJob(claim, claimed_at=100.0), Request(work)
    request.times = {"submitted": 100.01, "encoded": 100.05, "joined": 100.06, "denoised": 101.0, "decoded": 101.2}
    request.steps, request.tokens = steps, ((40, 32),)
    job.request, job.made = request, made_with(request, FAMILY, None)
    return job, request


def told(job: LeasedJob) -> Account:
    found = Account.read(account_of(job))
    assert found is not None
    return found


def test_steps_become_runs_by_company_and_pauses(bench: Bench) -> None:
    alone, both = ("own",), ("own", "other")
    steps = [Step(100.1, alone, 2, 0.1), Step(100.2, alone, 2, 0.1), Step(100.3, both, 4, 0.1), Step(100.8, both, 4, None)]
    job, _ = leased(bench, steps, resumed_from=3)
    job.upload_began, job.upload_ended = 101.3, 101.35
    job.checkpoints = [(4, 100.4)]
    found = told(job)
    assert found.runs == (Run(4, 1, 2, 100, (100.0, 100.0)), Run(6, 2, 4, 300, (100.0,)), Run(7, 2, 4, 800, (200.0,)))
    assert found.spans == {
        "encoding": (10, 40),
        "waiting": (50, 10),
        "denoising": (60, 940),
        "decoding": (1000, 200),
        "uploading": (1300, 50),
    }
    assert (found.resumed_from, found.num_checkpoints, found.checkpoints, found.beside) == (3, 1, ((4, 400),), ("own", "other"))
    assert found.made is not None and (found.made.prompt_tokens, found.made.prompt_tokens_read) == (40, 32)


def test_a_job_is_not_among_those_that_shared_its_steps(bench: Bench) -> None:
    job, request = leased(bench, [])
    request.steps = [Step(100.1, (job.claim.record.id, *(f"other {i}" for i in range(20))), 2, 0.1)]
    assert told(job).beside == tuple(f"other {i}" for i in range(MAX_BESIDE))


def test_many_runs_are_joined_and_no_step_is_lost(bench: Bench) -> None:
    steps = [Step(100 + i / 10, ("own",) * (1 + i % 2), 2, 0.1) for i in range(300)]
    found = told(leased(bench, steps)[0])
    assert len(found.runs) <= MAX_RUNS and sum(len(run.durations_ms) for run in found.runs) == 300
    assert found.runs[1].first == 1 + len(found.runs[0].durations_ms) and found.runs[0].jobs == 2


def test_an_account_never_fails_a_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    job, request = leased(bench, [Step(cast(Any, "?"), ("own",), 2, 0.1)])
    assert account_of(job) == "" and "no account" in caplog.text
    job.request = None
    assert account_of(job) == account_of(LeasedJob(job.claim)) == ""
    assert request.steps


# Over HTTP


def test_an_owner_sees_steps_and_an_admin_also_who_shared_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_api(monkeypatch, Settings(auth="keys")) as live:

        def key(tenant: str, *scopes: str) -> dict[str, str]:
            text, _ = records.run(live.worker.redis, records.create_key(NewKey.parse(tenant=tenant, scopes=scopes)))
            return {"Authorization": f"Bearer {text}"}

        owner, admin, other = key("ann", "read", "submit"), key("ops", "admin"), key("bob", "read")
        job_id = live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2}, headers=owner).json()["id"]
        claim = live.worker.records.claim(job_id, "gpu0@secret-host:12", 30)
        assert claim is not None
        told_by_worker = account(runs=(Run(1, 2, 4, 10, (5.0, 6.0)),), beside=("foreign-job",))
        live.worker.records.settle(job_id, claim.token, Status.SUCCEEDED, account=told_by_worker)
        path = f"/v1/jobs/{job_id}/timeline"
        to_owner, to_admin = (live.http.get(path, headers=headers) for headers in (owner, admin))
        assert to_owner.status_code == to_admin.status_code == 200 and to_owner.headers["cache-control"] == "no-store"
        for answer in (to_owner, to_admin):
            (run,) = Timeline.model_validate(answer.json()).attempts[0].steps
            assert (run.count, run.jobs, run.rows, run.durations_ms) == (2, 2, 4, [5.0, 6.0])
        assert "secret-host" in to_admin.text and "foreign-job" in to_admin.text
        assert "secret-host" not in to_owner.text and "foreign-job" not in to_owner.text
        assert live.http.get(path, headers=other).status_code == 404
        schema = live.http.get("/openapi.json").json()
        answered = schema["paths"]["/v1/jobs/{job_id}/timeline"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert answered == {"$ref": "#/components/schemas/Timeline"} and "StepRun" in schema["components"]["schemas"]
