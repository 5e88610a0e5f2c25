"""One job from wake-up to settled record: every way in which the work can end, over real records."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fakeredis
import numpy as np
import pytest
import torch
from support.stubs import FAMILY, PATIENCE_S, RunnerBench

from latentline import records, routing
from latentline.errors import ConfigurationError, JobNotFound, StoreUnavailable
from latentline.jobs import Claim, JobError, JobRecord, JobRequest, JobWarning, Status, resolve
from latentline.records import MAX_ERRORS, Backoff, Records
from latentline.records.held import SUSPECT_CRASHES
from latentline_worker.callbacks.message import message_body
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.request import Request
from latentline_worker.generate import runner as runner_module
from latentline_worker.generate.runner import prepare
from latentline_worker.models.base import Text

SECRET = "/srv/weights/secret.safetensors: connection to 10.0.0.7 refused"
INTERNAL = JobError(code="internal_error", message="the worker failed on this job; its log has the details")


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


class Bench(RunnerBench):
    """Runs jobs on threads of its own, as Celery does."""

    def __init__(self, client: fakeredis.FakeRedis) -> None:
        super().__init__(Records(client))
        self.client = client
        self.pool = ThreadPoolExecutor(8)

    def submit(self, **fields: Any) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 4, "scheduler": "ddim", "seed": 1, **fields})
        return records.run(self.client, records.submit([resolve(request)], 600))[0].id

    def begin(self, job_id: str) -> Future[None]:
        return self.pool.submit(self.runner.run, job_id)

    def in_engine(self, **fields: Any) -> tuple[str, Request, Future[None]]:
        """A job that the engine has."""
        job_id = self.submit(**fields)
        done = self.begin(job_id)
        return job_id, self.engine.next(), done

    def get(self, job_id: str) -> JobRecord:
        return records.run(self.client, records.get(job_id))

    def raw(self, job_id: str) -> dict[str, str]:
        found: dict[str, str] = self.client.hgetall(routing.job_key(job_id))
        return found


@pytest.fixture
def bench(client: fakeredis.FakeRedis) -> Iterator[Bench]:
    made = Bench(client)
    yield made
    made.pool.shutdown(wait=False)
    made.engine.abandon_all()
    made.pool.shutdown()


def checkpoint(request: Request, step: int) -> Checkpoint:
    """A checkpoint of this request: (images, 2 * order, values)."""
    channels, rows, columns = request.work.latent_shape
    return Checkpoint(step, np.ones((request.num_images, 2 * request.work.table.order, channels * rows * columns), dtype=np.float32))


def test_a_job_succeeds_with_its_images_in_the_store(bench: Bench) -> None:
    job_id, request, done = bench.in_engine(num_images=2)
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    record = bench.get(job_id)
    assert (record.status, record.step, record.worker) == (Status.SUCCEEDED, 4, "cpu@test")
    assert [image.key for image in record.images] == list(bench.store.objects) == [f"default/{job_id}/1/{i}.png" for i in range(2)]
    assert record.timings["denoise_steps"] == 4 and record.timings["resumed_from"] == 0


def test_what_is_left_of_the_deadline_counts_from_the_start_of_the_attempt(bench: Bench) -> None:
    def left_s(record: JobRecord, started_at: float) -> float | None:
        return Claim(record=record.model_copy(update={"created_at": 100.0, "started_at": started_at}), token=1).deadline_in_s

    record = bench.get(bench.submit(deadline_s=60))
    assert (left_s(record, 110.0), left_s(record, 170.0)) == (50.0, -10.0), "the second has passed"
    assert left_s(bench.get(bench.submit()), 110.0) is None
    assert prepare(FAMILY, record, 5050.0).deadline == 5050.0


def test_a_job_that_is_cancelled_while_it_is_decoded_uploads_nothing(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    records.run(bench.client, records.cancel(job_id, 600))
    bench.leases.beat()  # hears of it; the engine is decoding and finishes all the same
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert bench.get(job_id).status is Status.CANCELLED
    assert bench.store.objects == {}


def test_a_cancelled_job_is_settled_as_cancelled(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    bench.engine.stop_request(request, "cancel")
    done.result(PATIENCE_S)
    assert (bench.get(job_id).status, bench.get(job_id).error) == (Status.CANCELLED, None)


def test_a_job_past_its_deadline_fails_with_that_code(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    bench.engine.stop_request(request, "expired")
    done.result(PATIENCE_S)
    error = bench.get(job_id).error
    assert bench.get(job_id).status is Status.FAILED and error is not None and error.code == "deadline_exceeded"


def test_what_the_text_encoder_cut_is_told_in_record_event_and_callback(bench: Bench) -> None:
    callback = {"url": "http://receiver.example/"}
    job_id, request, done = bench.in_engine(prompt="x " * 900, negative_prompt="y " * 90, callback=callback)
    request.work = replace(request.work, texts=(Text("x"), Text("y", negative=True)))
    request.tokens = ((902, 77), (92, 77))
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    record = bench.get(job_id)
    assert [(warning.code, warning.field) for warning in record.warnings] == [
        ("prompt_truncated", "prompt"),
        ("prompt_truncated", "negative_prompt"),
    ]
    message = record.warnings[0].message
    assert "902 tokens" in message and "first 77" in message and "825 were cut" in message
    told = [warning.model_dump() for warning in record.warnings]
    (event,) = [one for one in records.run(bench.client, records.events(job_id)) if one.terminal]
    assert event.data["warnings"] == told
    taken = bench.records.take_callback(f"msg_{job_id}_succeeded", 60)
    assert taken is not None and json.loads(message_body(taken, None))["data"]["warnings"] == told
    whole, request, done = bench.in_engine()
    request.tokens = ((77, 77), (3, 77))
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert bench.get(whole).warnings == ()
    assert "warnings" not in next(one for one in records.run(bench.client, records.events(whole)) if one.terminal).data


def test_only_the_newest_holder_warns_and_a_later_attempt_replaces_it(bench: Bench) -> None:
    warning = JobWarning(code="prompt_truncated", field="prompt", message="some")
    job_id = bench.submit()
    first = bench.records.claim(job_id, "one", 30)
    assert first is not None and bench.records.warn(job_id, first.token, [warning]) and bench.records.release(job_id, first.token)
    assert not bench.records.warn(job_id, first.token, [])
    second = bench.records.claim(job_id, "two", 30)
    assert second is not None and bench.get(job_id).warnings == (warning,)
    other = warning.model_copy(update={"message": "other"})
    assert bench.records.warn(job_id, second.token, [other]) and bench.get(job_id).warnings == (other,)
    assert bench.records.settle(job_id, second.token, Status.FAILED, error=INTERNAL).warnings == (other,)
    assert not bench.records.warn(job_id, second.token, [])


def test_the_text_of_an_internal_error_goes_to_the_log_and_never_to_the_client(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    job_id = bench.submit()
    for attempt in range(1, MAX_ERRORS + 1):
        with caplog.at_level(logging.ERROR):
            done = bench.begin(job_id)
            bench.engine.next().future.set_exception(RuntimeError(SECRET))
            done.result(PATIENCE_S)
        assert bench.get(job_id).attempt == attempt
        bench.client.delete(routing.delayed_key())  # the next try is due
    assert (bench.get(job_id).status, bench.get(job_id).error) == (Status.FAILED, INTERNAL)
    everything = [bench.raw(job_id), records.run(bench.client, records.dead_letters()), records.run(bench.client, records.events(job_id))]
    assert SECRET not in repr(everything)
    assert SECRET in caplog.text


def test_a_job_of_a_model_that_is_not_loaded_fails_and_names_those_that_are(bench: Bench) -> None:
    job_id = bench.submit(model="another")
    bench.begin(job_id).result(PATIENCE_S)
    error = bench.get(job_id).error
    assert error and (error.code, error.message) == ("invalid_request", "model: got 'another'; allowed: one of: latentline-emoji")


def test_a_job_that_does_not_fit_into_memory_fails_at_once(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    request.future.set_exception(torch.OutOfMemoryError("CUDA out of memory"))
    done.result(PATIENCE_S)
    error = bench.get(job_id).error
    assert bench.get(job_id).status is Status.FAILED and error is not None and error.code == "out_of_memory"


def test_missing_memory_while_uploading_costs_a_retry(bench: Bench) -> None:
    """The job fitted into memory: what is missing is the host's, where other uploads take some as well."""
    bench.store.problem = MemoryError()
    job_id, request, done = bench.in_engine()
    request.checkpoint = checkpoint(request, 4)
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert (bench.get(job_id).status, bench.raw(job_id)["errors"], bench.raw(job_id)["checkpoint_step"]) == (Status.QUEUED, "1", "4")


def test_the_pause_before_another_try_is_bounded_and_has_jitter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    retry, backoffs, bounds = Records.retry, [], []

    def asked(self: Records, job_id: str, token: int, error: Any, backoff: Backoff, account: str) -> Any:
        backoffs.append(backoff)
        return retry(self, job_id, token, error, backoff, account)

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.75

    monkeypatch.setattr(Records, "retry", asked)
    monkeypatch.setattr("latentline_worker.generate.runner.random.uniform", uniform)
    bench.store.problem = StoreUnavailable("the store does not answer")
    _, request, done = bench.in_engine()
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert (backoffs, bounds) == ([Backoff(first_s=2.0, most_s=60.0, jitter=0.75)], [(0.5, 1)])


def test_a_store_that_is_away_costs_a_retry_that_continues_from_the_last_checkpoint(bench: Bench) -> None:
    bench.store.problem = StoreUnavailable("the store does not answer")
    job_id, request, done = bench.in_engine()
    request.checkpoint = checkpoint(request, 4)
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert (bench.get(job_id).status, bench.raw(job_id)["errors"], bench.raw(job_id)["checkpoint_step"]) == (Status.QUEUED, "1", "4")
    bench.store.problem = None
    bench.client.delete(routing.delayed_key())
    done = bench.begin(job_id)
    again = bench.engine.next()
    assert again.work.resume is not None and again.work.resume.step == 4
    bench.engine.finish(again)
    done.result(PATIENCE_S)
    assert bench.get(job_id).status is Status.SUCCEEDED
    assert bench.get(job_id).timings["denoise_steps"] == 0


def test_a_store_that_refuses_this_worker_fails_the_job(bench: Bench) -> None:
    bench.store.problem = ConfigurationError("cannot store: AccessDenied")
    job_id, request, done = bench.in_engine()
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    error = bench.get(job_id).error
    assert bench.get(job_id).status is Status.FAILED and error == JobError(code="configuration_error", message="cannot store: AccessDenied")


def test_at_shutdown_a_job_goes_back_to_the_queue_with_its_newest_checkpoint(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    request.step = 3
    request.checkpoint = checkpoint(request, 3)
    bench.engine.stop_request(request, "shutdown")
    done.result(PATIENCE_S)
    record = bench.get(job_id)
    assert (record.status, record.step, bench.raw(job_id)["crashes"]) == (Status.QUEUED, 3, "0")
    saved = Checkpoint.from_bytes(bench.records.load_checkpoint(job_id), request.work)
    assert saved is not None and saved.step == 3 and np.array_equal(saved.history, request.checkpoint.history)


def no_memory(*_: object) -> bytes:
    raise MemoryError


@pytest.mark.parametrize("problem", ["compressing", "writing"])
@pytest.mark.parametrize("end", ["shutdown", "error"])
def test_a_checkpoint_that_fails_keeps_no_job_from_going_back_to_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, problem: str, end: str
) -> None:
    def refused(*_: object) -> bool:
        raise ConfigurationError("the broker has no memory left")

    if problem == "compressing":
        monkeypatch.setattr(Checkpoint, "to_bytes", no_memory)
    else:
        monkeypatch.setattr(bench.records, "checkpoint", refused)
    job_id, request, done = bench.in_engine()
    request.checkpoint = checkpoint(request, 3)
    if end == "shutdown":
        bench.engine.stop_request(request, "shutdown")
    else:
        request.future.set_exception(RuntimeError(SECRET))
    done.result(PATIENCE_S)
    assert (bench.get(job_id).status, bench.raw(job_id)["crashes"]) == (Status.QUEUED, "0")
    assert bench.raw(job_id)["errors"] == ("1" if end == "error" else "0")


@pytest.mark.parametrize("reason", ["stale", "lost"])
def test_a_job_whose_lease_is_lost_is_left_alone(bench: Bench, reason: str) -> None:
    job_id, request, done = bench.in_engine()
    before = bench.raw(job_id)
    bench.engine.stop_request(request, reason)
    done.result(PATIENCE_S)
    assert bench.raw(job_id) == before and before["status"] == "running"


def test_a_result_that_comes_too_late_changes_nothing(bench: Bench) -> None:
    job_id, request, done = bench.in_engine()
    bench.client.zadd(routing.leases_key(), {job_id: 1})
    bench.client.hset(routing.job_key(job_id), "lease_until", 1)
    assert bench.records.reclaim() == [job_id]
    newer = bench.records.claim(job_id, "another@test", 30)
    before = bench.raw(job_id)
    bench.engine.finish(request)
    done.result(PATIENCE_S)
    assert newer is not None and bench.raw(job_id) == before


def test_a_wake_up_without_a_record_becomes_a_dead_letter(bench: Bench) -> None:
    bench.runner.run("nobody")
    (letter,) = records.run(bench.client, records.dead_letters())
    assert (letter["id"], letter["kind"]) == ("nobody", "message") and "no job 'nobody'" in letter["reason"]
    with pytest.raises(JobNotFound):
        bench.get("nobody")


def test_a_wake_up_for_a_job_that_has_ended_does_nothing(bench: Bench) -> None:
    job_id = bench.submit()
    records.run(bench.client, records.cancel(job_id, 600))
    before = bench.raw(job_id)
    bench.runner.run(job_id)
    assert bench.raw(job_id) == before and bench.engine.submitted.empty()


def wait_until_one_waits_alone(bench: Bench) -> None:
    for _ in range(PATIENCE_S * 1000):
        if bench.runner._lock._num_waiting:
            return
        threading.Event().wait(0.001)
    pytest.fail("no job waits to run alone")


def test_a_job_with_which_workers_were_lost_runs_alone(bench: Bench) -> None:
    first, request, first_done = bench.in_engine()
    suspect, later = bench.submit(), bench.submit()
    bench.client.hset(routing.job_key(suspect), "crashes", SUSPECT_CRASHES)
    suspect_done = bench.begin(suspect)
    wait_until_one_waits_alone(bench)
    later_done = bench.begin(later)
    assert bench.engine.submitted.empty() and bench.get(suspect).status is Status.QUEUED
    bench.engine.finish(request)
    first_done.result(PATIENCE_S)
    request = bench.engine.next()
    assert request.work.job_id == suspect and bench.raw(suspect)["alone"] == "1"
    assert bench.engine.submitted.empty() and bench.get(later).status is Status.QUEUED
    bench.engine.finish(request)
    suspect_done.result(PATIENCE_S)
    request = bench.engine.next()
    assert request.work.job_id == later and bench.raw(later)["alone"] == "0"
    bench.engine.finish(request)
    later_done.result(PATIENCE_S)
    assert {bench.get(one).status for one in (first, suspect, later)} == {Status.SUCCEEDED}


def test_a_stalled_engine_gets_no_further_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()
    stalled, statuses = [True, True, False], []

    def sleep(_: float) -> None:
        statuses.append(bench.get(job_id).status)

    monkeypatch.setattr(bench.runner, "_engine_stalled", lambda: stalled.pop(0))
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    done = bench.begin(job_id)
    bench.engine.finish(bench.engine.next())
    done.result(PATIENCE_S)
    assert statuses == [Status.QUEUED] * 2 and bench.get(job_id).status is Status.SUCCEEDED
