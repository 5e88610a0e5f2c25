"""A step that fails has changed nothing: trying it again gives the picture of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.engines import FIXED_ROWS, counted, drain, make_engine, once, work

from latentline_worker.engine.clock import StepClock
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.lane import Lane
from latentline_worker.engine.request import Request, Work
from latentline_worker.models.sd import StableDiffusion

STOCHASTIC = ["ddpm", "euler_ancestral", "dpm2_ancestral", "lcm", "sa_solver"]


@contextmanager
def draw_out_of_memory(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[int]]:
    """Let one call of ``torch.randn`` (from 1) run out of memory, after it has drawn its numbers."""
    real, calls = torch.randn, []

    def randn(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        drawn = real(*args, **options)
        if len(calls) == number:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        yield calls


@contextmanager
def write_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the first write into the lane run out of memory: the last moment at which a step can fail."""
    real, calls = Lane._commit, []

    def commit(self: Lane, step: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "_commit", commit)
        yield calls


@contextmanager
def event_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the last mark of the first step run out of memory: on CUDA a mark is an event that has to be made."""
    real, calls = StepClock.mark, []

    def mark(self: StepClock) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise torch.AcceleratorError("CUDA error: out of memory")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(StepClock, "mark", mark)
        yield calls


def generators(engine: Engine, requests: list[Request]) -> list[torch.Tensor]:
    return [engine.lanes[r.lane]._noises[slot].generator.get_state() for r in requests for slot in r.slots]


def pair(family: StableDiffusion, scheduler: str) -> list[Work]:
    """Two unlike jobs, which a retry in halves runs one after the other."""
    return [
        work(family, "first", scheduler, 5, guidance=1.0, seeds=(1,)),
        work(family, "second", "euler_ancestral", 6, guidance=1.0, seeds=(3, 4)),
    ]


@pytest.mark.parametrize(
    "fail", [lambda m: draw_out_of_memory(m, 2), write_out_of_memory, event_out_of_memory], ids=["drawing", "writing", "marking"]
)
@pytest.mark.parametrize("fixed_rows", [None, FIXED_ROWS], ids=["default", "reproducible"])
@pytest.mark.parametrize("scheduler", STOCHASTIC)
@once
def test_a_step_tried_again_gives_the_undisturbed_picture_to_the_bit(
    family: StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: str,
    fixed_rows: int | None,
    fail: Callable[[pytest.MonkeyPatch], Any],
) -> None:
    def pictures(disturbed: bool) -> list[torch.Tensor]:
        engine = make_engine(family, fixed_rows=fixed_rows)
        requests = [engine.submit(one) for one in pair(family, scheduler)]
        while min(request.step for request in requests) < 2:  # in the reproducible mode they join one after the other
            engine.step()
        before = [request.step for request in requests]
        if disturbed:
            with fail(monkeypatch) as calls:
                engine.step()
            assert len(calls) > 2, "nothing was tried again: the test shows nothing"
        else:
            # As the retry in halves runs them: in the default mode a network's result may depend on the rows beside it.
            engine._settle(requests, {**engine._run(requests[:1]), **engine._run(requests[1:])})
        assert [request.step for request in requests] == [step + 1 for step in before]
        drain(engine)
        return [request.result(0) for request in requests]

    for disturbed, undisturbed in zip(pictures(True), pictures(False), strict=True):
        assert torch.equal(disturbed, undisturbed)


@once
def test_a_step_that_fails_leaves_history_and_generators_as_they_were(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family)
    requests = [engine.submit(one) for one in pair(family, "ddpm")]
    engine.step()
    (lane,) = engine.lanes.values()
    history, states = lane._history.clone(), generators(engine, requests)
    with write_out_of_memory(monkeypatch), pytest.raises(torch.OutOfMemoryError):
        lane.step(requests, 8)
    engine.clock.drop()
    assert torch.equal(lane._history, history)
    assert all(torch.equal(now, before) for now, before in zip(generators(engine, requests), states, strict=True))
    assert [request.step for request in requests] == [1, 1]


@once
def test_a_time_that_cannot_be_read_runs_no_step_twice(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def take() -> float:
        raise torch.AcceleratorError("CUDA error: out of memory")

    engine = make_engine(family)
    calls = counted(family, monkeypatch)
    for one in pair(family, "ddpm"):
        engine.submit(one)
    monkeypatch.setattr(engine.clock, "take", take)
    with pytest.raises(torch.AcceleratorError):
        engine.step()
    assert calls == [3]


@once
def test_a_step_that_failed_at_its_commit_is_not_timed(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family)
    requests = [engine.submit(one) for one in pair(family, "ddpm")]
    with write_out_of_memory(monkeypatch):
        engine.step()
    assert [request.step for request in requests] == [1, 1]
    assert engine.clock.take() is None and engine._launched == [], "two parts ran, and two times were taken"
    known = engine.planner.cost._lanes[requests[0].lane].times
    assert {rows: len(times) for rows, times in known.items()} == {1: 1, 2: 1}
