"""The order in which jobs join a lane, and slots that an earlier job left."""

from __future__ import annotations

import pytest
import torch
from support.engines import assert_close, drain, encoded_times, make_engine, once, recorded_texts, run, solo, tight, work

from latentline.errors import NumericalError
from latentline_worker.engine.conditioning import MICRO_BATCH
from latentline_worker.models.sd import StableDiffusion


@once
def test_of_jobs_that_wait_for_a_slot_the_more_urgent_joins_first(family: StableDiffusion) -> None:
    engine = tight(family, 1)
    engine.submit(work(family, "running", steps=2))
    engine.step()
    patient = engine.submit(work(family, "patient", priority=9))
    usual = engine.submit(work(family, "usual", priority=5))
    urgent = engine.submit(work(family, "urgent", priority=0))
    joined = []
    while not engine.idle:
        engine.step()
        joined += [request.work.job_id for request in (patient, usual, urgent) if "joined" in request.times and request.step == 1]
    assert joined == ["urgent", "usual", "patient"]


@once
def test_of_equal_jobs_the_earlier_joins_first(family: StableDiffusion) -> None:
    engine = tight(family, 1)
    first, second = engine.submit(work(family, "first")), engine.submit(work(family, "second"))
    engine.step()
    assert (first.step, second.step) == (1, 0)


@once
def test_the_text_of_a_more_urgent_job_is_encoded_first(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_texts(family, monkeypatch)
    engine = make_engine(family)
    for i in range(MICRO_BATCH + 2):
        engine.submit(work(family, f"patient {i}", guidance=1.0, priority=9))
    urgent = engine.submit(work(family, "urgent", guidance=1.0, priority=0))
    engine.step()
    assert calls[0][0] == "urgent" and urgent.step == 1


@once
def test_a_slot_in_which_a_job_left_nan_gives_the_next_job_its_own_picture(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero coefficient does not cancel a NaN: beside a job that uses all of its history, a new job's empty one is read."""
    victim = work(family, "victim", "ddim", steps=3)
    expected = solo(family, victim)
    engine = tight(family, 3)  # the second slot needs memory for a copy of the first
    with monkeypatch.context() as patch:
        patch.setattr(family, "encode", encoded_times(family, lambda prompt: float("nan")))
        (bad,) = run(engine, work(family, "bad", "pndm", steps=5, guidance=1.0))
    with pytest.raises(NumericalError):
        bad.result(0)
    (lane,) = engine.lanes.values()
    dirty = int(torch.isnan(lane._history).any(-1).any(-1).nonzero()[0])
    lane._free.remove(dirty)
    mate = engine.submit(work(family, "mate", "pndm", steps=20))
    while mate.step < 6:  # from the fifth call on it uses the whole history
        engine.step()
    lane._free.append(dirty)  # the next job gets that very slot
    request = engine.submit(victim)
    drain(engine)
    assert_close(request.result(0), expected)
    assert request.shared_steps == 3, "it ran alone: the test shows nothing"
