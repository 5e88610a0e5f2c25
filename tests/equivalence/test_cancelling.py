"""A job can be cancelled in every phase."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from support.engines import (
    assert_cancelled,
    assert_close,
    drain,
    make_engine,
    num_used,
    once,
    recorded_texts,
    run,
    solo,
    tight,
    work,
)

from latentline.jobs import Phase
from latentline_worker.models.sd import StableDiffusion


@once
def test_a_job_cancelled_before_its_first_step_is_never_encoded(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = recorded_texts(family, monkeypatch)
    engine = make_engine(family)
    victim = engine.submit(work(family, "victim"))
    mate = engine.submit(work(family, "mate"))
    assert victim.phase == Phase.ENCODING
    victim.cancel("first")
    victim.cancel("second")
    engine.step()
    assert_cancelled(victim, "first")
    assert (victim.step, mate.step) == (0, 1)
    assert "victim" not in functools.reduce(operator.iadd, texts, [])


@once
def test_a_job_cancelled_while_it_waits_for_a_slot_leaves_the_queue(family: StableDiffusion) -> None:
    engine = tight(family, 1)
    running = engine.submit(work(family, "running", steps=5))
    victim = engine.submit(work(family, "victim"))
    engine.step()
    engine.step()
    assert (running.step, victim.step, victim.phase) == (2, 0, Phase.ENCODING)
    victim.cancel()
    engine.step()
    assert_cancelled(victim, "cancelled")
    drain(engine)
    assert torch.isfinite(running.result(0)).all()


@once
def test_a_job_cancelled_while_denoising_frees_its_slots_for_the_next_step(family: StableDiffusion) -> None:
    engine = tight(family, 2)
    victim = engine.submit(work(family, "victim", steps=50, seeds=(1, 2)))
    waiting = engine.submit(work(family, "waiting", steps=3, seeds=(3, 4)))
    for _ in range(3):
        engine.step()
    assert (victim.phase, victim.step, waiting.step) == (Phase.DENOISING, 3, 0)
    victim.cancel()
    engine.step()
    assert_cancelled(victim, "cancelled")
    assert waiting.step == 1
    drain(engine)
    assert_close(waiting.result(0), solo(family, work(family, "waiting", steps=3, seeds=(3, 4))))
    assert num_used(engine) == 0


@once
def test_a_job_cancelled_while_decoding_gives_no_pixels(family: StableDiffusion) -> None:
    engine = make_engine(family, decode_batch=1)
    victim = engine.submit(work(family, "victim", steps=2, seeds=(1, 2, 3), decode=True))
    mate = engine.submit(work(family, "mate", steps=2, seeds=(4,), decode=True))
    engine.step()
    engine.step()
    assert victim.phase == Phase.DECODING
    assert not victim.future.done()
    victim.cancel()
    drain(engine)
    assert_cancelled(victim, "cancelled")
    assert mate.result(0).shape == (1, 32, 32, 3)


@once
def test_cancelling_a_job_that_is_done_changes_nothing(family: StableDiffusion) -> None:
    engine = make_engine(family)
    (request,) = run(engine, work(family))
    request.cancel()
    engine.step()
    assert torch.isfinite(request.result(0)).all()
