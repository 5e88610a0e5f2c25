"""Text encoding in micro-batches."""

from __future__ import annotations

import functools
import operator

import pytest
from support.engines import (
    FIXED_ROWS,
    assert_close,
    drain,
    make_engine,
    once,
    recorded_texts,
    run,
    solo,
    tight,
    work,
)

from latentline.jobs import Phase
from latentline_worker.engine.conditioning import MICRO_BATCH
from latentline_worker.models.sd import StableDiffusion


@once
def test_texts_are_encoded_in_micro_batches_and_each_one_once(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_texts(family, monkeypatch)
    engine = make_engine(family)
    works = [work(family, f"thing {i}", steps=3) for i in range(12)]
    requests = [engine.submit(one) for one in works]
    engine.step()
    assert [len(call) for call in calls] == [MICRO_BATCH], "a step waits for one micro-batch at most"
    assert [request.step for request in requests] == [1] * (MICRO_BATCH - 1) + [0] * (13 - MICRO_BATCH)
    drain(engine)
    assert [len(call) for call in calls] == [MICRO_BATCH, 13 - MICRO_BATCH]
    assert len(set(functools.reduce(operator.iadd, calls, []))) == 13  # twelve prompts and the one negative prompt
    run(engine, *works)
    assert len(calls) == 2, "known texts are not encoded again"


@once
def test_an_unguided_job_does_not_encode_its_negative_prompt(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_texts(family, monkeypatch)
    run(make_engine(family), work(family, "a cat", guidance=1.0))
    assert calls == [["a cat"]]


@once
def test_in_the_reproducible_mode_texts_are_encoded_one_by_one(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_texts(family, monkeypatch)
    requests = run(make_engine(family, fixed_rows=FIXED_ROWS), *[work(family, f"thing {i}") for i in range(3)])
    assert sorted(calls) == [["blurry"], ["thing 0"], ["thing 1"], ["thing 2"]]
    assert all(request.future.exception(0) is None for request in requests)


@pytest.mark.parametrize("place", [0, 2, 5])
@once
def test_a_text_that_cannot_be_encoded_fails_its_own_job_alone(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    recorded_texts(family, monkeypatch)
    engine = make_engine(family)
    requests = run(engine, *[work(family, "bad" if i == place else f"thing {i}", seeds=(i,)) for i in range(6)])
    for i, request in enumerate(requests):
        if i == place:
            with pytest.raises(ValueError, match="no such letter"):
                request.result(0)
        else:
            assert_close(request.result(0), solo(family, work(family, f"thing {i}", seeds=(i,))))


@once
def test_a_text_that_cannot_be_encoded_does_not_hold_up_others_while_the_first_waits_for_a_slot(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded_texts(family, monkeypatch)
    engine = tight(family, 1)
    running = engine.submit(work(family, "running", steps=40))
    waiting = engine.submit(work(family, "waiting"))
    engine.step()
    assert (running.step, waiting.step) == (1, 0)
    bad = engine.submit(work(family, "bad"))
    other = engine.submit(work(family, "other", size=(48, 40)))  # another lane: there is a slot for it
    for _ in range(5):
        engine.step()
    assert isinstance(bad.future.exception(0) if bad.future.done() else None, ValueError)
    assert other.phase != Phase.ENCODING
    assert waiting.phase == Phase.ENCODING, "it did not wait: the test shows nothing"
