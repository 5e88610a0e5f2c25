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
from latentline_worker.engine.conditioning import MICRO_BATCH, Conditioner
from latentline_worker.models.base import Text
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


@once
def test_cached_texts_stay_within_their_memory(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text takes 77 x 32 x 4 = 9,856 bytes; the newest ten stay however little memory there is."""
    calls = recorded_texts(family, monkeypatch)
    for limit, kept in ((12 * 9_856, 12), (12 * 9_856 - 1, 11), (0, 10)):
        conditioner = Conditioner(cache_bytes=limit)
        for i in range(12):
            assert not conditioner.encode_some([(family, Text(f"thing {i}"))])
        found = [i for i in range(12) if conditioner.get(family, Text(f"thing {i}"))]
        assert found == list(range(12 - kept, 12))
        assert conditioner.num_bytes == kept * 9_856
    assert len(calls) == 36


@once
def test_texts_of_jobs_that_wait_for_memory_are_encoded_as_far_as_there_is_memory_for_their_rows(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded_texts(family, monkeypatch)
    engine = tight(family, 1)
    engine._admission._row_bytes = 2 * 9_856  # the rows of one guided job
    engine.conditioner._micro_batch = 1
    requests = [engine.submit(work(family, f"thing {i}", steps=20, seeds=(i,))) for i in range(6)]
    for _ in range(12):
        engine.step()
    # The first is in its lane. The second's rows are within the limit, with those of the third they are not.
    assert [bool(request.conditions) for request in requests] == [False, True, True, False, False, False]
    assert len(calls) == 4
    drain(engine)
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
    other = engine.submit(work(family, "other", size=(48, 40)))
    for _ in range(5):
        engine.step()
    assert isinstance(bad.future.exception(0) if bad.future.done() else None, ValueError)
    assert other.conditions
    assert waiting.phase == Phase.ENCODING, "it did not wait: the test shows nothing"
