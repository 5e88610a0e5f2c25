"""Out of memory: batches are split, a job that does not fit fails alone, and one that cannot fit is refused before it starts."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from support.engines import (
    FIXED_ROWS,
    MOST_STEPS,
    SIGNATURE,
    assert_close,
    counted,
    drain,
    embeds,
    keys,
    limit_for,
    make_engine,
    mates_of,
    num_used,
    once,
    run,
    short_of_memory,
    solo,
    tight,
    work,
)

from latentline.errors import OutOfMemory
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.footprint import peak_bytes
from latentline_worker.engine.memory import Memory
from latentline_worker.engine.request import LaneKey, Request
from latentline_worker.models.sd import StableDiffusion


@pytest.mark.parametrize("most", [1, 3, 8])
@once
def test_out_of_memory_splits_the_batch_and_every_job_equals_its_solo_run(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    works = mates_of(family, 11)
    expected = [solo(family, one) for one in works]
    events = short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: len(latents) <= most)
    engine = make_engine(family)
    requests = run(engine, *works)
    assert events, "memory always sufficed: the test shows nothing"
    for request, latents in zip(requests, expected, strict=True):
        assert_close(request.result(0), latents)
    assert min(engine.planner.cost.limit(key) for key in engine.lanes) <= most
    assert num_used(engine) == 0


@once
def test_after_out_of_memory_batches_stay_within_what_fitted(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    events = short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: len(latents) <= 5)
    engine = make_engine(family)
    requests = [engine.submit(work(family, seeds=(i,), steps=10)) for i in range(6)]
    engine.step()
    assert events == [12, 6]
    drain(engine)
    assert events == [12, 6], "it ran out of memory again with jobs of two rows each"
    assert all(torch.isfinite(request.result(0)).all() for request in requests)


@once
def test_a_job_of_more_rows_than_fit_does_not_run_out_of_memory_at_every_step(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = work(family, seeds=(1, 2, 3, 4), steps=6)
    expected = solo(family, subject)
    events = short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: len(latents) <= 4)
    assert_close(solo(family, subject), expected)
    assert events == [8]


@once
def test_no_forward_has_more_rows_than_are_allowed(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there is no error when memory runs out: the kernel kills the process."""
    subject = work(family, seeds=(1, 2, 3, 4), steps=3)
    expected = solo(family, subject)
    calls = counted(family, monkeypatch)
    assert_close(solo(family, subject, max_rows=4), expected)
    assert max(calls) <= 4


@once
def test_a_job_that_does_not_fit_by_itself_fails_alone(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    mates = [work(family, f"thing {i}", steps=3 + i, seeds=(i,)) for i in range(4)]
    expected = [solo(family, mate) for mate in mates]
    glutton = embeds(family, "glutton")[0]
    short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: not any(torch.allclose(row, glutton) for row in prompt_embeds))
    engine = make_engine(family)
    first, *requests = run(engine, work(family, "glutton", steps=3), *mates)
    with pytest.raises(torch.OutOfMemoryError):
        first.result(0)
    for request, latents in zip(requests, expected, strict=True):
        assert_close(request.result(0), latents)


@once
def test_a_shape_that_never_fits_fails_and_the_others_go_on(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: latents.shape[-1] <= 16)
    engine = make_engine(family)
    big = [engine.submit(work(family, "big", seeds=(i,), size=(64, 64))) for i in range(3)]
    small = [engine.submit(work(family, "small", seeds=(i,))) for i in range(3)]
    drain(engine)
    for request in big:
        with pytest.raises(torch.OutOfMemoryError):
            request.result(0)
    assert all(torch.isfinite(request.result(0)).all() for request in small)


@once
def test_out_of_memory_in_the_reproducible_mode_fails_the_job_and_frees_its_slots(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, family, lambda latents, prompt_embeds: len(latents) < FIXED_ROWS)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    for request in run(engine, work(family, "a"), work(family, "b")):
        with pytest.raises(torch.OutOfMemoryError):
            request.result(0)
    assert num_used(engine) == 0


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def lane_bytes(engine: Engine) -> int:
    return sum(tensor.nbytes for lane in engine.lanes.values() for tensor in (lane._history, *lane._rows.values()))


@once
def test_a_hundred_times_out_of_memory_leak_nothing(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    glutton = embeds(family, "glutton")[0]
    events = short_of_memory(
        monkeypatch,
        family,
        lambda latents, prompt_embeds: len(latents) <= 3 and not any(torch.allclose(row, glutton) for row in prompt_embeds),
    )
    engine = make_engine(family)
    kept: list[Request] = []  # failed jobs, whose errors must not hold the tensors of the step that failed

    def trouble() -> None:
        big, mate, failed = run(engine, work(family, "big", seeds=(1, 2), steps=3), work(family, "mate", steps=2), work(family, "glutton"))
        assert isinstance(failed.future.exception(0), torch.OutOfMemoryError)
        assert torch.isfinite(big.result(0)).all() and torch.isfinite(mate.result(0)).all()
        kept.append(failed)

    for _ in range(3):
        trouble()
    before, grown, num_events = num_tensors(), lane_bytes(engine), len(events)
    while len(events) < num_events + 100:
        trouble()
    assert len(kept) > 10
    assert (num_tensors(), lane_bytes(engine)) == (before, grown)
    assert num_used(engine) == 0
    assert engine.idle


@pytest.mark.parametrize("failing", [1, 2], ids=["history", "rows"])
@once
def test_a_lane_that_cannot_grow_fails_the_job_and_stays_whole(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Memory that runs out while slots are added must not leave slots that do not exist."""
    engine = make_engine(family)
    run(engine, work(family, guidance=1.0))  # the lane has its first slots, and the text is known
    real, calls = torch.cat, []

    def cat(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", cat)
        crowd = engine.submit(work(family, seeds=tuple(range(9)), guidance=1.0))
        engine.step()
    assert isinstance(crowd.future.exception(0), torch.OutOfMemoryError)
    assert num_used(engine) == 0
    again = work(family, seeds=tuple(range(12)), guidance=1.0)
    assert_close(run(engine, again)[0].result(0), solo(family, again))


@once
def test_a_shape_too_large_for_the_memory_is_refused_with_the_byte_counts_and_smaller_ones_run(
    family: StableDiffusion, measured: Memory
) -> None:
    own, large = keys(family)
    assert measured.needed_bytes(large) > 2 * measured.needed_bytes(own)
    engine = make_engine(family, max_rows=4, memory_limit_bytes=limit_for(measured, 2 * measured.needed_bytes(own)))
    engine.warm_up()
    good = [engine.submit(work(family, f"thing {i}", seeds=(i,), size=(64, 64), decode=True)) for i in range(3)]
    bad = engine.submit(work(family, "large", size=(128, 128), decode=True))
    drain(engine)
    with pytest.raises(OutOfMemory) as refused:
        bad.result(0)
    needed = f"{engine.memory.needed_bytes(large, gathered=2):,}"
    assert re.fullmatch(
        f"width, height: got 128, 128; one picture of that size needs {needed} bytes with one row in a step, "
        f"and this worker has {engine.memory.room:,}; allowed: smaller ones",
        refused.value.message,
    )
    assert bad.step == 0 and large not in engine.lanes
    for request in good:
        assert request.result(0).shape == (1, 64, 64, 3)


SIZES = [(64, 64), (56, 64), (64, 56), (56, 56), (64, 48), (48, 64), (56, 48), (48, 56)]


@once
def test_eight_sizes_on_memory_for_three_stay_within_it(family: StableDiffusion, measured: Memory) -> None:
    """Slots of all lanes, forwards, decodes and texts together. What can never fit is refused, all else has its turn."""
    lanes = [LaneKey("tiny", family.latent_shape(*size), SIGNATURE) for size in SIZES]
    slots = sum(sorted(measured.slot_bytes(key) for key in lanes)[-3:])
    limit = limit_for(measured, slots + max(measured.step_bytes(key, 1, 2) for key in lanes))
    engine = make_engine(family, max_rows=1, memory_limit_bytes=limit)
    engine.warm_up()
    engine.lanes.drop(next(iter(engine.lanes)))  # its slots are from before what is measured below
    for size in [*SIZES, (96, 96)]:
        engine.memory.row_bytes(LaneKey("tiny", family.latent_shape(*size), SIGNATURE))  # else the counting is counted
    works = [
        work(family, f"thing {i}", "dpmpp_2m", 3 + i % 3 if i else 40, seeds=(i,), size=SIZES[i % 8], decode=i % 3 == 0) for i in range(16)
    ]
    expected = [solo(family, one) for one in works]
    with peak_bytes(family.device) as peak:
        requests = [engine.submit(one) for one in works]
        large = engine.submit(work(family, "large", size=(96, 96)))
        most_lanes = 0
        for _ in range(MOST_STEPS):
            if engine.idle:
                break
            engine.step()
            if requests[0].remaining:  # later the largest step is that of smaller sizes, and there is memory for more
                most_lanes = max(most_lanes, sum(lane.num_used > 0 for lane in engine.lanes.values()))
    assert most_lanes == 3
    assert 0.6 * limit < peak() <= limit
    for request, one in zip(requests, expected, strict=True):
        if request.work.decode:
            assert (request.result(0).int() - one.int()).abs().max() <= 1
        else:
            assert_close(request.result(0), one)
    with pytest.raises(OutOfMemory, match=r"width, height: got 96, 96; .* needs [\d,]+ bytes .* this worker has [\d,]+; allowed: smaller"):
        large.result(0)


@once
def test_more_images_than_fit_are_refused_with_how_many_do(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, memory_limit_bytes=limit_for(measured, 1.2 * measured.needed_bytes(own)))
    engine.warm_up()
    bad = engine.submit(work(family, "many", seeds=tuple(range(64))))
    drain(engine)
    with pytest.raises(OutOfMemory) as refused:
        bad.result(0)
    found = re.fullmatch(
        r"num_images: got 64; of 32 x 32 px they need ([\d,]+) bytes, .* has ([\d,]+); allowed: (\d+)", refused.value.message
    )
    assert found, refused.value.message
    assert int(found[1].replace(",", "")) > int(found[2].replace(",", "")) == engine.memory.room
    allowed = int(found[3])
    good, one_more = run(engine, work(family, "good", seeds=tuple(range(allowed))), work(family, "more", seeds=tuple(range(allowed + 1))))
    assert torch.isfinite(good.result(0)).all()
    with pytest.raises(OutOfMemory):
        one_more.result(0)


@once
def test_in_the_reproducible_mode_a_shape_is_refused_whose_fixed_rows_do_not_fit(family: StableDiffusion, measured: Memory) -> None:
    """The network always runs all of the fixed rows: memory for one is not enough."""
    _own, large = keys(family)
    limit = limit_for(measured, 1.1 * measured.needed_bytes(large))
    rows = 1 + limit // measured.row_bytes(large)  # of the large shape, one row more than there is memory for
    engine = make_engine(family, fixed_rows=rows, memory_limit_bytes=limit)
    engine.warm_up()
    bad, good = run(engine, work(family, "large", size=(128, 128)), work(family, "small"))
    with pytest.raises(OutOfMemory, match=f"bytes with {rows} rows in a step, and this worker has {engine.memory.room:,}"):
        bad.result(0)
    assert torch.isfinite(good.result(0)).all()


@once
def test_the_refusal_names_the_bytes_that_are_needed(family: StableDiffusion) -> None:
    engine = make_engine(family, memory_limit_bytes=1000)
    (request,) = run(engine, work(family))
    # A slot: 9 x 1,024 float32 values of history, 2 x 77 x 32 of prompt embeds, and 8 bytes. Nothing is measured without a warm-up.
    # Of the limit 4% are for texts.
    with pytest.raises(OutOfMemory, match=r"got 32, 32; .* needs 56,584 bytes with one row in a step, and this worker has 960;"):
        request.result(0)


@once
def test_images_beyond_the_slots_wait_for_their_turn(family: StableDiffusion) -> None:
    engine = tight(family, 3)
    requests = [engine.submit(work(family, seeds=(i,), steps=3 + i % 3)) for i in range(8)]
    most = 0
    for _ in range(MOST_STEPS):
        if engine.idle:
            break
        engine.step()
        most = max(most, num_used(engine))
    assert most <= 3
    for i, request in enumerate(requests):
        assert_close(request.result(0), solo(family, work(family, seeds=(i,), steps=3 + i % 3)))


@once
def test_a_job_that_takes_all_slots_runs_alone(family: StableDiffusion) -> None:
    engine = tight(family, 3)
    big, mate = run(engine, work(family, seeds=(1, 2, 3)), work(family, "mate"))
    assert big.result(0).shape[0] == 3
    assert big.shared_steps == 0
    assert torch.isfinite(mate.result(0)).all()


@once
def test_a_job_of_several_images_gets_its_slots_however_many_small_ones_keep_arriving(family: StableDiffusion) -> None:
    engine = tight(family, 2)
    engine.submit(work(family, seeds=(0,), steps=2))
    engine.step()
    big = engine.submit(work(family, seeds=(1, 2), steps=2))
    for i in range(60):
        engine.submit(work(family, seeds=(i,), steps=2))
        engine.step()
    assert big.step > 0, "sixty steps, and every free slot went to a job that came later"


@once
def test_no_memory_for_a_copy_after_the_step_fails_that_job_alone(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family)
    victim, other = engine.submit(work(family, "victim", steps=3)), engine.submit(work(family, "other", steps=3))
    engine.step()
    lane = engine.lanes[victim.lane]
    real = lane.latents

    def latents(request: Request) -> torch.Tensor:
        if request is victim:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return real(request)

    monkeypatch.setattr(lane, "latents", latents)
    drain(engine)
    with pytest.raises(torch.OutOfMemoryError):
        victim.result(0)
    assert torch.isfinite(other.result(0)).all()
    assert num_used(engine) == 0
