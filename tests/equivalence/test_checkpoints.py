"""Checkpoints: what their bytes are bound to, when they are taken, and what happens without memory for one."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import FIXED_ROWS, drain, make_engine, once, run, snapshot, solo, work

from latentline_worker.engine import checkpoint as module
from latentline_worker.engine.checkpoint import FORMAT, SHARE, Checkpoint, CheckpointSchedule
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.lane import Lane
from latentline_worker.engine.request import Request, Work
from latentline_worker.models.checksums import of_modules
from latentline_worker.models.sd import StableDiffusion
from latentline_worker.samplers import sampler_table


class Job:
    """What a checkpoint belongs to."""

    def __init__(self, identity: str) -> None:
        self.identity = identity


JOB = Job("one job")
HISTORY = np.arange(2 * 4 * 16, dtype=np.float32).reshape(2, 4, 16) - 30.5


EARLIER = (
    "000000577b22666f726d6174223a20322c202273746570223a20332c20227368617065223a205b322c20322c20325d2c20226f66223a205b226d222c"
    "205b312c20312c20325d2c20342c20312c205b312c20325d2c20352e305d7d00000000006f00000000000000120000800000500083e0c87801b33f60"
    "efc06075c009000c6a02bb"
)


def data_of(step: int = 12) -> bytes:
    data = Checkpoint(step, HISTORY).to_bytes(JOB)
    assert data is not None
    return data


def rewritten(**changes: Any) -> bytes:
    """The bytes with another head."""
    data = data_of()
    length = int.from_bytes(data[:4], "big")
    head = json.dumps({**json.loads(data[4 : 4 + length]), **changes}).encode()
    return len(head).to_bytes(4, "big") + head + data[4 + length :]


def test_bytes_give_the_checkpoint_back_to_the_bit() -> None:
    found = Checkpoint.from_bytes(data_of(), JOB)
    assert found is not None
    assert (found.step, found.history.dtype) == (12, np.float32)
    assert np.array_equal(found.history, HISTORY)


def test_bytes_written_by_earlier_workers_are_ignored() -> None:
    """Fleets are upgraded worker by worker. These bytes were written by commit 24a4813, in format 2: the job starts anew."""
    assert Checkpoint.from_bytes(bytes.fromhex(EARLIER), JOB) is None


def test_a_checkpoint_of_other_work_is_not_taken() -> None:
    assert Checkpoint.from_bytes(data_of(), Job("another job")) is None


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"\x00",
        b"\xff" * 40,
        rewritten(format=FORMAT + 1),
        rewritten(format=FORMAT - 1),
        rewritten(shape=[2, 4, 17]),
        rewritten(shape=None),
        rewritten(step="twelve"),
        data_of()[:-20],
        data_of()[:30],
        data_of()[: -len(data_of()) // 2],
        data_of()[:-4] + b"\x00\x00\x00\x00",
        (2).to_bytes(4, "big") + b"[]",
        (4).to_bytes(4, "big") + b"null",
    ],
    ids=[
        "nothing", "empty", "one byte", "noise", "later format", "earlier format", "other shape", "no shape", "no number",
        "cut", "cut in the head", "cut in half", "wrong sum", "a list", "null",
    ],
)  # fmt: skip
def test_bytes_that_cannot_be_used_give_no_checkpoint_and_no_error(data: bytes | None) -> None:
    assert Checkpoint.from_bytes(data, JOB) is None


def test_a_checkpoint_above_the_bound_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", HISTORY.nbytes)
    assert Checkpoint(1, HISTORY).to_bytes(JOB) is not None
    monkeypatch.setattr(module, "MAX_BYTES", HISTORY.nbytes - 1)
    assert Checkpoint(1, HISTORY).to_bytes(JOB) is None


OTHERS: dict[str, Callable[[StableDiffusion, Work], Work]] = {
    "the prompt": lambda family, one: work(family, "a dog", "dpmpp_2m", 7, 3.0, (4, 5)),
    "the negative prompt": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 5), negative_prompt="fog"),
    "the sampler": lambda family, one: work(family, "a cat", "dpmpp_2m_karras", 7, 3.0, (4, 5)),
    "the steps": lambda family, one: work(family, "a cat", "dpmpp_2m", 8, 3.0, (4, 5)),
    "guidance": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 3.5, (4, 5)),
    "no guidance": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 1.0, (4, 5)),
    "a seed": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 6)),
    "the images": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 3.0, (4,)),
    "the size": lambda family, one: work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 5), (48, 40)),
    "the model": lambda family, one: dataclasses.replace(one, model="large"),
    "the weights or their type": lambda family, one: dataclasses.replace(one, weights=one.weights.replace("float32", "bfloat16")),
}


@pytest.mark.parametrize("what", OTHERS)
@once
def test_all_that_the_latents_depend_on_is_part_of_a_works_identity(family: StableDiffusion, what: str) -> None:
    one = work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 5))
    assert OTHERS[what](family, one).identity != one.identity


@once
def test_what_the_latents_do_not_depend_on_is_no_part_of_it(family: StableDiffusion) -> None:
    one = work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 5))
    same = work(family, "a cat", "dpmpp_2m", 7, 3.0, (4, 5), priority=0, tenant="acme", preview_every=2, decode=True, deadline=1.0)
    assert same.identity == one.identity


def test_the_weights_digest_sees_every_weight(family: StableDiffusion) -> None:
    """Of two models under one name, the second must not continue the first one's checkpoint."""
    before = of_modules([family.unet])
    assert before == of_modules([family.unet])
    weight = family.unet.conv_out.weight
    with torch.no_grad():
        kept = weight[0, 0, 0, 0].clone()
        weight[0, 0, 0, 0] += 1
        changed = of_modules([family.unet])
        weight[0, 0, 0, 0] = kept
    assert changed != before == of_modules([family.unet])


def test_a_tables_digest_does_not_see_the_last_bits_of_a_fit() -> None:
    """They depend on the CPU, and a job may be resumed on another one."""
    table = sampler_table("dpmpp_2m", {}, 7)
    near = dataclasses.replace(table, coefficients=table.coefficients * (1 + 1e-13) - 1e-18)
    far = dataclasses.replace(table, coefficients=table.coefficients * (1 + 1e-4))
    assert near.digest == table.digest != far.digest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def first_due(schedule: CheckpointSchedule, clock: SimpleNamespace, num_jobs: int) -> float:
    """Seconds after the last checkpoint, in tenths, from which the next is due."""
    for tenths in range(10_000):
        clock.now = 100.0 + tenths / 10
        if schedule.due(100.0, num_jobs):
            return tenths / 10
    raise AssertionError("never")


def test_checkpoints_that_cost_nothing_are_due_after_the_interval(clock: SimpleNamespace) -> None:
    assert first_due(CheckpointSchedule(2.0), clock, 50) == 2.0


def test_checkpoints_that_cost_much_are_due_when_their_share_of_the_time_allows(clock: SimpleNamespace) -> None:
    """The cost of one checkpoint of every job is at most ``SHARE`` of the time between two."""
    schedule = CheckpointSchedule(2.0)
    for _ in range(100):
        schedule.record_taken(0.01)
        schedule.record_written(0.03)
    assert first_due(schedule, clock, 5) == pytest.approx(5 * 0.04 / SHARE, abs=0.15)
    assert first_due(schedule, clock, 10) == pytest.approx(10 * 0.04 / SHARE, abs=0.15)
    assert schedule.num_taken == 100
    assert schedule.total_s == pytest.approx(4.0)


@pytest.mark.parametrize("told", ["record_taken", "record_written"])
def test_both_costs_count_and_one_disturbed_time_counts_a_fifth(clock: SimpleNamespace, told: str) -> None:
    schedule = CheckpointSchedule(0.0)
    getattr(schedule, told)(0.1)
    assert first_due(schedule, clock, 1) == pytest.approx(0.02 / SHARE, abs=0.15)


@once
def test_the_engine_tells_the_schedule_what_checkpoints_cost(family: StableDiffusion) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    run(engine, work(family, steps=1))  # the one after the last step is taken whatever is due
    schedule = engine.checkpoint_schedule
    assert schedule is not None
    assert schedule.num_taken == 1 and schedule.total_s > 0 and schedule.taken_s == pytest.approx(0.2 * schedule.total_s)


def always_due(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.checkpoint_schedule, "due", lambda *_: True)


@once
def test_after_denoising_there_is_a_checkpoint_of_the_final_latents(family: StableDiffusion) -> None:
    engine = make_engine(family, checkpoint_s=3600.0, fixed_rows=FIXED_ROWS)
    one = work(family, "a", "euler_ancestral", steps=4, seeds=(1, 2))
    (request,) = run(engine, one)
    checkpoint = request.checkpoint
    assert checkpoint is not None and checkpoint.step == 4
    assert np.array_equal(checkpoint.history[:, 0], request.result(0).flatten(1).numpy())


@once
def test_a_job_whose_denoising_was_complete_is_decoded_and_not_denoised_again(family: StableDiffusion) -> None:
    one = work(family, "a", "euler_ancestral", steps=4, seeds=(1, 2), decode=True)
    engine = make_engine(family, checkpoint_s=3600.0, fixed_rows=FIXED_ROWS)
    (request,) = run(engine, one)
    assert request.checkpoint is not None
    resume = Checkpoint.from_bytes(request.checkpoint.to_bytes(one), one)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    (resumed,) = run(engine, dataclasses.replace(one, resume=resume))
    assert engine.num_rows == 0, "the network was called"
    assert torch.equal(resumed.result(0), request.result(0))
    assert {"joined", "denoised", "decoded"} <= resumed.times.keys()


@once
def test_a_checkpoint_shows_its_step_and_later_steps_do_not_change_it(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    always_due(engine, monkeypatch)
    request = engine.submit(work(family, "a", "ddpm", steps=8, seeds=(1, 2)))
    for step in range(1, 6):
        engine.step()
        checkpoint = request.checkpoint
        assert checkpoint is not None and checkpoint.step == step
        assert np.array_equal(checkpoint.history, snapshot(engine, request).history)
    kept = checkpoint.history.copy()
    engine.step()
    assert np.array_equal(checkpoint.history, kept)


def no_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("out of memory (simulated)")


@once
def test_a_checkpoint_for_which_there_is_no_memory_is_skipped(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = work(family, "a", "ddpm", steps=5, decode=True)
    engine = make_engine(family, checkpoint_s=0.0)
    always_due(engine, monkeypatch)
    request = engine.submit(one)
    engine.step()
    before = request.checkpoint
    assert before is not None and before.step == 1
    began = request.checkpoint_at
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Lane, "snapshot", no_memory)
        drain(engine)  # also the one after the last step
    assert torch.equal(request.result(0), solo(family, one))
    assert request.checkpoint is before, "the one before is kept"
    assert request.checkpoint_at > began, "the next try is as far away as after any checkpoint"
    assert "job a: no checkpoint (OutOfMemoryError)" in caplog.text


@once
def test_a_shutdown_without_memory_for_checkpoints_keeps_the_ones_before(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family, checkpoint_s=0.0)
    always_due(engine, monkeypatch)
    requests: list[Request] = [engine.submit(work(family, seeds=(i,), steps=9)) for i in range(2)]
    engine.step()
    monkeypatch.setattr(Lane, "snapshot", no_memory)
    engine.step()
    engine.stop()
    engine.start()
    engine.stop()
    for request in requests:
        with pytest.raises(Exception, match="shutdown"):
            request.result(0)
        assert request.checkpoint is not None and request.checkpoint.step == 1


@once
def test_a_shutdown_checkpoints_every_image_of_every_job(family: StableDiffusion) -> None:
    """Resumed elsewhere, each job ends as it would have here."""
    works: list[Work] = [work(family, f"thing {i}", "euler_ancestral", 9 + i, seeds=(i, i + 10)) for i in range(3)]
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    requests = [engine.submit(one) for one in works]
    for _ in range(6):  # texts are encoded one a step, so the jobs stand at different steps
        engine.step()
    engine.stop()
    engine.start()
    engine.stop()
    assert len({request.step for request in requests}) > 1
    for one, request in zip(works, requests, strict=True):
        resume = None
        if request.step:
            assert request.checkpoint is not None and request.checkpoint.step == request.step
            resume = Checkpoint.from_bytes(request.checkpoint.to_bytes(one), one)
        (resumed,) = run(make_engine(family, fixed_rows=FIXED_ROWS), dataclasses.replace(one, resume=resume))
        assert torch.equal(resumed.result(0), solo(family, one, fixed_rows=FIXED_ROWS))


@pytest.mark.parametrize(
    ("problem", "traced"), [(torch.OutOfMemoryError("simulated"), False), (TypeError("a defect"), True)], ids=["memory", "defect"]
)
@once
def test_a_checkpoint_that_is_left_out_is_logged_with_its_place_unless_memory_is_missing(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: Exception, traced: bool
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise problem

    engine = make_engine(family, checkpoint_s=3600.0)  # one is due, after the last step
    monkeypatch.setattr(Lane, "snapshot", fail)
    run(engine, work(family, "a", steps=1))
    (entry,) = [entry for entry in caplog.records if "no checkpoint" in entry.getMessage()]
    assert entry.getMessage() == f"job a: no checkpoint ({type(problem).__name__})"
    assert ("a defect" in caplog.text, bool(entry.exc_info)) == (traced, traced)
