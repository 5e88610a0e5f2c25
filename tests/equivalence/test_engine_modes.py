"""The engine's modes and its bad days: reproducible rows, half precision, no memory left, previews, cancelling, threads."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import operator
import random
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from latentline.errors import ConfigurationError, OutOfMemory
from latentline.jobs import Phase
from latentline_worker.engine import decoder, network
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.conditioning import MICRO_BATCH
from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.memory import Memory
from latentline_worker.engine.network import Network
from latentline_worker.engine.planner import Planner
from latentline_worker.engine.preview import LatentToRgb
from latentline_worker.engine.request import Cancelled, LaneKey, Request, Work
from latentline_worker.models.sd import StableDiffusion
from latentline_worker.samplers import make_scheduler, sampler_table

RELATIVE = 1e-4  # fp32: what the contract promises against solo runs
# Bfloat16 has 8 bits of mantissa, and a batch may sum in another order. Measured with torch 2.13.0 on an x86-64 CPU: the
# pictures below are at worst 62.6 dB from their solo runs; among more and longer mates it was 55.4 dB. The bound leaves
# 10 dB below that for other CPUs' kernels.
HALF_PSNR_DB = 45.0
FIXED_ROWS = 8
MOST_STEPS = 2000  # of any test: an engine that does not get idle is a failure and no hang

# For tests to which the prediction type makes no difference.
once = pytest.mark.parametrize("pipeline", ["epsilon"], indirect=True)

Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Everything(CostModel):
    """As many rows as memory allows: which jobs meet then does not depend on this machine's timings."""

    def budget(self, lane: Hashable) -> int:
        return self.limit(lane)


def make_engine(family: StableDiffusion, **options: Any) -> Engine:
    engine = Engine(family, **options)
    engine.planner = Planner(Everything(engine.planner.cost.max_rows))
    return engine


def work(
    family: StableDiffusion,
    prompt: str = "a cat",
    scheduler: str = "ddim",
    steps: int = 4,
    guidance: float = 5.0,
    seeds: tuple[int, ...] = (1,),
    size: tuple[int, int] = (32, 32),
    **options: Any,
) -> Work:
    return Work(
        job_id=prompt,
        model="tiny",
        prompt=prompt,
        negative_prompt="blurry",
        latent_shape=family.latent_shape(*size),
        table=sampler_table(scheduler, family.scheduler_config, steps),
        guidance_scale=guidance,
        seeds=seeds,
        **{"decode": False, **options},
    )


def drain(engine: Engine) -> None:
    """Step until nothing is left to do."""
    for _ in range(MOST_STEPS):
        if engine.idle:
            return
        engine.step()
    pytest.fail(f"the engine is not idle after {MOST_STEPS} steps")


def run(engine: Engine, *works: Work) -> list[Request]:
    requests = [engine.submit(one) for one in works]
    drain(engine)
    return requests


def solo(family: StableDiffusion, one: Work, **options: Any) -> torch.Tensor:
    return run(make_engine(family, **options), one)[0].result(0)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def num_used(engine: Engine) -> int:
    return sum(lane.num_used for lane in engine.lanes.values())


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, family: StableDiffusion, fits: Callable[[torch.Tensor, torch.Tensor], bool]
) -> list[int]:
    """Let the denoiser run out of memory unless the latents and states fit. To be called before the engine is made.

    Returns:
        The row counts of the calls that did not fit; it grows.
    """
    real, events = family.denoise, []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if not fits(latents, states):
            events.append(len(latents))
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return real(latents, timesteps, states)

    monkeypatch.setattr(family, "denoise", denoise)
    return events


@pytest.fixture
def half(pipeline: StableDiffusionPipeline) -> StableDiffusion:
    return StableDiffusion(
        "tiny",
        vae=copy.deepcopy(pipeline.vae),
        unet=copy.deepcopy(pipeline.unet),
        text_encoder=copy.deepcopy(pipeline.text_encoder),
        tokenizer=pipeline.tokenizer,
        scheduler_config=dict(pipeline.scheduler.config),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


# Reproducible mode and half precision

SUBJECTS: list[dict[str, Any]] = [
    {"scheduler": "dpmpp_2m", "steps": 9, "guidance": 6.0, "seeds": (42,)},
    {"scheduler": "euler_ancestral", "steps": 7, "guidance": 1.0, "seeds": (42, 43, 44)},
    {"scheduler": "unipc", "steps": 6, "guidance": 3.0, "seeds": (1, 2, 3, 4, 5)},  # ten rows: more than are fixed
    {"scheduler": "lcm", "steps": 4, "guidance": 2.0, "seeds": (7, 8), "size": (48, 40)},
]


def mates_of(family: StableDiffusion, seed: int, count: int = 5, **options: Any) -> list[Work]:
    """Jobs that differ in all that a batch allows, and some of another size."""
    choose = random.Random(seed)
    return [
        work(
            family,
            "thing " + "abcdefgh"[choose.randrange(8)] * choose.randint(1, 5),
            choose.choice(["ddim", "euler", "euler_ancestral", "dpmpp_2m_karras", "dpmpp_3m", "unipc", "lcm", "heun", "pndm"]),
            choose.randint(3, 6),
            choose.choice([1.0, 2.0, 7.5]),
            tuple(choose.randrange(1000) for _ in range(choose.randint(1, 3))),
            choose.choice([(32, 32), (32, 32), (32, 32), (48, 40)]),
            **options,
        )
        for _ in range(count)
    ]


def variants(family: StableDiffusion, subject: Work, make: Callable[[], Engine], seeds: tuple[int, ...] = (0,)) -> dict[str, Request]:
    """The subject alone, among unlike jobs, late, and with the same jobs in another order."""
    found = {"alone": run(make(), subject)[0]}
    for seed in seeds:
        mates = mates_of(family, seed, decode=subject.decode)
        found[f"first of {seed}"] = run(make(), subject, *mates)[0]
        found[f"last of {seed}"] = run(make(), *mates[::-1], subject)[-1]
        engine = make()
        others = [engine.submit(mate) for mate in mates[:3]]
        for _ in range(2):
            engine.step()
        late = engine.submit(subject)
        engine.step()
        others += [engine.submit(mate) for mate in mates[3:]]
        drain(engine)
        assert all(other.future.done() for other in others)
        found[f"late among {seed}"] = late
    return found


@pytest.mark.parametrize("decode", [False, True], ids=["latents", "pixels"])
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_in_the_reproducible_mode_a_job_is_bit_identical_in_any_company(
    family: StableDiffusion, subject: dict[str, Any], decode: bool
) -> None:
    found = variants(family, work(family, **subject, decode=decode), lambda: make_engine(family, fixed_rows=FIXED_ROWS), (0, 1))
    expected = found["alone"].result(0)
    assert expected.dtype == (torch.uint8 if decode else torch.float32)
    for name, request in found.items():
        assert torch.equal(request.result(0), expected), name
    if found["alone"].rows <= FIXED_ROWS:  # else it runs alone, between the others
        assert sum(request.shared_steps > 0 for request in found.values()) >= 3, "it hardly met another job: the test shows nothing"


@once
def test_in_the_reproducible_mode_every_forward_has_the_fixed_number_of_rows(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = family.denoise, set()

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        sizes.add((len(latents), len(timesteps), len(states)))
        return real(latents, timesteps, states)

    monkeypatch.setattr(family, "denoise", denoise)
    run(make_engine(family, fixed_rows=FIXED_ROWS), *mates_of(family, 5))
    assert sizes == {(FIXED_ROWS,) * 3}


@once
def test_the_reproducible_mode_is_bit_identical_after_warm_up_too(family: StableDiffusion) -> None:
    """The recorded forward is optimised while it runs: the first replays and the later ones must agree."""

    def warm() -> Engine:
        engine = make_engine(family, fixed_rows=FIXED_ROWS)
        engine.warm_up()
        return engine

    subject = work(family, scheduler="euler_ancestral", steps=7)
    expected = solo(family, subject, fixed_rows=FIXED_ROWS)
    engine = warm()
    for _ in range(3):
        assert torch.equal(run(engine, subject)[0].result(0), expected)
    assert torch.equal(run(engine, subject, *mates_of(family, 3))[0].result(0), expected)


@once
def test_the_reproducible_mode_holds_in_half_precision(half: StableDiffusion) -> None:
    found = variants(half, work(half, **SUBJECTS[0], decode=True), lambda: make_engine(half, fixed_rows=FIXED_ROWS))
    for name, request in found.items():
        assert torch.equal(request.result(0), found["alone"].result(0)), name


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_in_the_default_mode_a_job_stays_close_to_its_solo_run(family: StableDiffusion, subject: dict[str, Any]) -> None:
    found = variants(family, work(family, **subject), lambda: make_engine(family))
    assert sum(request.shared_steps > 0 for request in found.values()) >= 2
    for request in found.values():
        assert_close(request.result(0), found["alone"].result(0))


@pytest.mark.parametrize("subject", [SUBJECTS[0], SUBJECTS[2]], ids=lambda subject: str(subject["scheduler"]))
def test_in_half_precision_a_batched_picture_looks_like_its_solo_run(half: StableDiffusion, subject: dict[str, Any]) -> None:
    found = variants(half, work(half, **subject, decode=True), lambda: make_engine(half))
    for name, request in found.items():
        assert psnr_db(request.result(0), found["alone"].result(0)) >= HALF_PSNR_DB, name


# Out of memory


@pytest.mark.parametrize("most", [1, 3, 8])
@once
def test_out_of_memory_splits_the_batch_and_every_job_equals_its_solo_run(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    works = mates_of(family, 11)
    expected = [solo(family, one) for one in works]
    events = short_of_memory(monkeypatch, family, lambda latents, states: len(latents) <= most)
    engine = make_engine(family)
    requests = run(engine, *works)
    assert events, "memory always sufficed: the test shows nothing"
    for request, latents in zip(requests, expected, strict=True):
        assert_close(request.result(0), latents)
    assert min(engine.planner.cost.limit(key) for key in engine.lanes) <= most
    assert num_used(engine) == 0


@once
def test_after_out_of_memory_batches_stay_within_what_fitted(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    events = short_of_memory(monkeypatch, family, lambda latents, states: len(latents) <= 5)
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
    events = short_of_memory(monkeypatch, family, lambda latents, states: len(latents) <= 4)
    assert_close(solo(family, subject), expected)
    assert events == [8]


@once
def test_no_forward_has_more_rows_than_are_allowed(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nobody raises an error when memory runs out: the process is killed."""
    subject = work(family, seeds=(1, 2, 3, 4), steps=3)
    expected = solo(family, subject)
    calls = counted(family, monkeypatch)
    assert_close(solo(family, subject, max_rows=4), expected)
    assert max(calls) <= 4


@once
def test_a_job_that_does_not_fit_by_itself_fails_alone(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    mates = [work(family, f"thing {i}", steps=3 + i, seeds=(i,)) for i in range(4)]
    expected = [solo(family, mate) for mate in mates]
    glutton = family.encode(["glutton"])[0]
    short_of_memory(monkeypatch, family, lambda latents, states: not any(torch.allclose(row, glutton) for row in states))
    engine = make_engine(family)
    first, *requests = run(engine, work(family, "glutton", steps=3), *mates)
    with pytest.raises(torch.OutOfMemoryError):
        first.result(0)
    for request, latents in zip(requests, expected, strict=True):
        assert_close(request.result(0), latents)


@once
def test_a_shape_that_never_fits_fails_and_the_others_go_on(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, family, lambda latents, states: latents.shape[-1] <= 16)
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
    short_of_memory(monkeypatch, family, lambda latents, states: len(latents) < FIXED_ROWS)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    for request in run(engine, work(family, "a"), work(family, "b")):
        with pytest.raises(torch.OutOfMemoryError):
            request.result(0)
    assert num_used(engine) == 0


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def lane_bytes(engine: Engine) -> int:
    tensors = [value for lane in engine.lanes.values() for value in vars(lane).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


@once
def test_a_hundred_times_out_of_memory_leak_nothing(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    glutton = family.encode(["glutton"])[0]
    events = short_of_memory(
        monkeypatch, family, lambda latents, states: len(latents) <= 3 and not any(torch.allclose(row, glutton) for row in states)
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


@pytest.mark.parametrize("failing", [1, 2, 3], ids=["history", "states", "negative states"])
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


def test_an_engine_that_fails_itself_lets_nobody_wait(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a job's failure, which the others survive, but one of the loop around them."""
    engine = make_engine(family)
    begun = threading.Event()

    select = engine.planner.select

    def fail(requests: Sequence[Request]) -> list[Request]:
        if engine.num_steps >= 2:
            begun.set()
            raise RuntimeError("nobody expects this")
        return select(requests)

    monkeypatch.setattr(engine.planner, "select", fail)
    first, second = engine.submit(work(family, steps=20)), engine.submit(work(family, steps=20))
    engine.start()
    assert begun.wait(60)
    for request in (first, second, engine.submit(work(family, steps=20))):
        with pytest.raises(Cancelled, match=r"lost|shutdown"):
            request.result(60)
    assert engine.stalled_for() == float("inf")
    assert "the engine has failed" in caplog.text
    engine.stop()


class FakeGraph:
    """What a captured CUDA graph does as far as tensors go: one static output, overwritten by every replay."""

    def __init__(self, forward: Denoise, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self._forward = forward
        self._out = forward(*rows).clone()

    def __call__(self, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self._out.copy_(self._forward(*rows))


@pytest.mark.parametrize("fixed_rows", [None, 4])
@once
def test_parts_of_a_split_batch_do_not_share_the_output_of_a_captured_graph(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, fixed_rows: int | None
) -> None:
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps, states = torch.full((8,), 500.0), family.encode(list("abcdefgh"))
    expected = Network(family)(x, timesteps, states)[0]
    short_of_memory(monkeypatch, family, lambda latents, states: len(latents) <= 4)
    monkeypatch.setattr(network, "_Graph", FakeGraph)
    net = Network(family, fixed_rows)
    net._graphs = {}
    got, rows = net(x, timesteps, states)
    assert rows == 4
    assert_close(got, expected)


# Admission


def keys(family: StableDiffusion) -> tuple[LaneKey, LaneKey]:
    """The lanes of the model's own size and of twice that: four times the pixels."""
    width, height = family.info.default_width, family.info.default_height
    own, large = (LaneKey("tiny", family.latent_shape(factor * width, factor * height), 77) for factor in (1, 2))
    return own, large


def needed_bytes(memory: Memory, key: LaneKey, rows: int = 1) -> int:
    return memory.slot_bytes(key, 32) + max(rows * memory.row_bytes(key), memory.decode_bytes(key))


@pytest.fixture
def measured(family: StableDiffusion) -> Memory:
    """What a warm-up without a limit finds."""
    engine = make_engine(family, max_rows=1)
    engine.warm_up()
    return engine.memory


@once
def test_a_shape_too_large_for_the_memory_is_refused_with_the_byte_counts_and_smaller_ones_run(
    family: StableDiffusion, measured: Memory
) -> None:
    own, large = keys(family)
    limit = 2 * needed_bytes(measured, own)
    assert needed_bytes(measured, large) > limit

    engine = make_engine(family, max_rows=4, memory_limit_bytes=limit)
    engine.warm_up()
    good = [engine.submit(work(family, f"thing {i}", seeds=(i,), size=(64, 64), decode=True)) for i in range(3)]
    bad = engine.submit(work(family, "large", size=(128, 128), decode=True))
    drain(engine)
    with pytest.raises(OutOfMemory) as refused:
        bad.result(0)
    channels, rows, columns = large.latent_shape
    assert f"latents of {channels}x{rows}x{columns} need {needed_bytes(engine.memory, large):,} bytes" in refused.value.message
    assert f"this worker has {limit:,}" in refused.value.message
    assert bad.step == 0 and large not in engine.lanes
    for request in good:
        assert request.result(0).shape == (1, 64, 64, 3)


@once
def test_in_the_reproducible_mode_a_shape_is_refused_whose_fixed_rows_do_not_fit(family: StableDiffusion, measured: Memory) -> None:
    """The network always runs all of the fixed rows: memory for one is not enough."""
    _own, large = keys(family)
    limit = int(1.1 * needed_bytes(measured, large))
    rows = 1 + limit // measured.row_bytes(large)  # of the large shape, one row more than there is memory for
    engine = make_engine(family, fixed_rows=rows, memory_limit_bytes=limit)
    engine.warm_up()
    bad, good = run(engine, work(family, "large", size=(128, 128)), work(family, "small"))
    with pytest.raises(OutOfMemory, match=f"this worker has {limit:,}"):
        bad.result(0)
    assert torch.isfinite(good.result(0)).all()


@once
def test_the_refusal_names_the_bytes_that_are_needed(family: StableDiffusion) -> None:
    engine = make_engine(family, memory_limit_bytes=1000)
    key = LaneKey("tiny", (4, 16, 16), 77)
    (request,) = run(engine, work(family))
    with pytest.raises(OutOfMemory, match=f"4x16x16 need {engine.memory.slot_bytes(key, 32):,} bytes for one row and .* has 1,000:"):
        request.result(0)


def tight(family: StableDiffusion, slots: int) -> Engine:
    """An engine whose memory allows so many images between steps."""
    key = LaneKey("tiny", family.latent_shape(32, 32), 77)
    engine = make_engine(family)
    engine.memory.usable = 4 * slots * engine.memory.slot_bytes(key, 32)
    assert engine.memory.num_slots(key, 32) == slots
    return engine


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
def test_a_job_with_more_images_than_slots_runs_alone(family: StableDiffusion) -> None:
    engine = tight(family, 2)
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


# Previews


def test_previews_come_every_so_many_steps_with_a_pixel_per_latent(family: StableDiffusion) -> None:
    engine = make_engine(family)
    request = engine.submit(work(family, steps=7, seeds=(1, 2), size=(48, 40), preview_every=2))
    quiet = engine.submit(work(family, steps=7, size=(48, 40)))
    seen = []
    while not engine.idle:
        engine.step()
        seen.append(request.preview.step if request.preview else 0)
    assert seen == [0, 2, 2, 4, 4, 6, 6]
    assert request.preview is not None
    assert request.preview.pixels.shape == (2, 20, 24, 3)
    assert request.preview.pixels.dtype == torch.uint8
    assert quiet.preview is None


def test_previews_do_not_change_the_picture(family: StableDiffusion) -> None:
    expected = solo(family, work(family, steps=6, decode=True))
    assert torch.equal(solo(family, work(family, steps=6, decode=True, preview_every=1)), expected)


def test_the_preview_map_follows_the_real_decode_of_smooth_latents(family: StableDiffusion) -> None:
    """Measured 0.63: this decoder's weights are random. The bundled model's own pictures gave 0.95."""
    coarse = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(99))  # other latents than the fit's own
    latents = F.interpolate(coarse, (16, 16), mode="bicubic")
    latents = latents / latents.std()
    cheap = LatentToRgb.fit(family, 4)(latents).float()
    with torch.inference_mode():
        real = family.decode(latents, tiled=False)
    pooled = F.adaptive_avg_pool2d(real.permute(0, 3, 1, 2).float(), (16, 16)).permute(0, 2, 3, 1)
    correlation = float(torch.corrcoef(torch.stack([cheap.flatten(), pooled.flatten()]))[0, 1])
    assert correlation > 0.5


@once
def test_the_preview_map_of_a_linear_decoder_is_exact(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weights, latents = torch.randn(4, 3, generator=generator) * 0.05, torch.randn(2, 4, 16, 16, generator=generator)

    def decode(latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        rgb = torch.einsum("nchw,cd->nhwd", latents, weights) + 0.5
        return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)

    monkeypatch.setattr(family, "decode", decode)
    got, expected = LatentToRgb.fit(family, 4)(latents), decode(latents, tiled=False)[:, ::2, ::2]
    assert (got.int() - expected.int()).abs().max() <= 2  # of 255: rounding and clamping


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m"])
def test_denoised_is_the_schedulers_own_prediction_of_the_clean_latents(
    pipeline: StableDiffusionPipeline, family: StableDiffusion, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, outputs = family.denoise, []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        outputs.append(real(latents, timesteps, states))
        return outputs[-1]

    monkeypatch.setattr(family, "denoise", denoise)
    engine = make_engine(family)
    request = engine.submit(work(family, scheduler=scheduler, steps=6, guidance=1.0))
    reference = make_scheduler(scheduler, pipeline.scheduler.config)
    reference.set_timesteps(6)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * reference.init_noise_sigma
    for t in reference.timesteps[:-1]:
        engine.step()
        if scheduler == "dpmpp_2m":
            # The scheduler keeps its prediction to itself, at the step at which it stands.
            if reference.step_index is None:
                reference._init_step_index(t)
            expected = reference.convert_model_output(outputs[-1], sample=x)
            x = reference.step(outputs[-1], t, x, return_dict=False)[0]
        else:
            stepped = reference.step(outputs[-1], t, x)
            x, expected = stepped.prev_sample, stepped.pred_original_sample
        with torch.inference_mode():
            assert_close(engine.lanes[request.lane].denoised(request), expected)


@once
def test_a_preview_that_fails_costs_no_job_its_picture(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any) -> LatentToRgb:
        raise torch.OutOfMemoryError("out of memory (simulated)")

    monkeypatch.setattr(LatentToRgb, "fit", fit)
    engine = make_engine(family)
    requests = run(engine, work(family, "curious", preview_every=1), work(family, "mate"))
    for request in requests:
        assert torch.isfinite(request.result(0)).all()


# Decoding


def test_the_engine_gives_the_pixels_that_the_family_decodes(family: StableDiffusion) -> None:
    latents = solo(family, work(family, steps=6, seeds=(1, 2)))
    pixels = solo(family, work(family, steps=6, seeds=(1, 2), decode=True))
    with torch.inference_mode():
        assert torch.equal(pixels, family.decode(latents, tiled=False))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 32, 32, 3))


class Decodes:
    """Records the calls of ``family.decode``; some fail."""

    def __init__(self, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = family.decode
        self.calls: list[tuple[int, bool]] = []  # images, tiled
        self.fails: Callable[[torch.Tensor, bool], Exception | None] = lambda latents, tiled: None
        monkeypatch.setattr(family, "decode", self)

    def __call__(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        self.calls.append((len(latents), tiled))
        if error := self.fails(latents, tiled):
            raise error
        return self._real(latents, tiled=tiled)


@once
def test_images_of_several_jobs_are_decoded_together(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    requests = run(make_engine(family, decode_batch=4), *[work(family, seeds=(i, i + 10), decode=True) for i in range(3)])
    assert decodes.calls == [(4, False), (2, False)]
    for i, request in enumerate(requests):
        expected = solo(family, work(family, seeds=(i, i + 10), decode=True))
        assert (request.result(0).int() - expected.int()).abs().max() <= 1  # rounding


@once
def test_images_of_unlike_sizes_are_not_decoded_together(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    engine = make_engine(family)
    requests = run(engine, work(family, size=(48, 40), decode=True), work(family, decode=True))
    assert decodes.calls == [(1, False), (1, False)]
    assert [request.result(0).shape for request in requests] == [(1, 40, 48, 3), (1, 32, 32, 3)]


@once
def test_in_the_reproducible_mode_images_are_decoded_one_by_one(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    run(make_engine(family, fixed_rows=FIXED_ROWS), *[work(family, seeds=(i, i + 10), decode=True) for i in range(2)])
    assert decodes.calls == [(1, False)] * 4


@pytest.mark.parametrize("guilty_image", [0, 1])
@once
def test_a_decode_that_fails_fails_its_own_job_alone(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, guilty_image: int) -> None:
    bad = work(family, "bad", seeds=(5, 6), decode=True)
    poison = solo(family, work(family, "bad", seeds=(5, 6)))[guilty_image]
    decodes = Decodes(family, monkeypatch)

    def fails(latents: torch.Tensor, tiled: bool) -> Exception | None:
        return ValueError("poison") if any(torch.allclose(image, poison, atol=1e-4) for image in latents) else None

    decodes.fails = fails
    engine = make_engine(family)
    before, failed, after = run(engine, work(family, "before", decode=True), bad, work(family, "after", seeds=(7, 8, 9), decode=True))
    with pytest.raises(ValueError, match="poison"):
        failed.result(0)
    assert before.result(0).shape == (1, 32, 32, 3)
    assert after.result(0).shape == (3, 32, 32, 3)
    assert num_used(engine) == 0


@once
def test_large_images_are_decoded_in_tiles(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TILE_ABOVE_PIXELS", 32 * 32)
    decodes = Decodes(family, monkeypatch)
    large, small = run(make_engine(family), work(family, size=(64, 64), decode=True), work(family, decode=True))
    assert sorted(decodes.calls) == [(1, False), (1, True)]
    latents = solo(family, work(family, size=(64, 64)))
    with torch.inference_mode():
        tiled, whole = family.decode(latents, tiled=True), family.decode(latents, tiled=False)
    assert torch.equal(large.result(0), tiled)
    assert large.result(0).shape == whole.shape == (1, 64, 64, 3)
    assert psnr_db(tiled, whole) > 25.0  # measured 34.6: group norms see one tile each
    assert small.result(0).shape == (1, 32, 32, 3)


@once
def test_a_decode_without_memory_is_tried_in_tiles(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [work(family, f"thing {i}", seeds=(i, i + 10), size=(64, 64), decode=True) for i in range(2)]
    expected = [solo(family, work(family, f"thing {i}", seeds=(i, i + 10), size=(64, 64))) for i in range(2)]
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: None if tiled else torch.OutOfMemoryError("out of memory (simulated)")
    requests = run(make_engine(family), *works)
    assert decodes.calls[0] == (4, False)
    for request, latents in zip(requests, expected, strict=True):
        with torch.inference_mode():
            tiled = torch.cat([family.decode(image[None], tiled=True) for image in latents])
        assert (request.result(0).int() - tiled.int()).abs().max() <= 1  # rounding


@once
def test_a_decode_batch_without_memory_is_tried_one_by_one_before_tiles(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("out of memory (simulated)") if len(latents) > 1 else None
    requests = run(make_engine(family), *[work(family, seeds=(i,), decode=True) for i in range(3)])
    assert decodes.calls == [(3, False), (1, False), (1, False), (1, False)]
    for i, request in enumerate(requests):
        assert (request.result(0).int() - solo(family, work(family, seeds=(i,), decode=True)).int()).abs().max() <= 1


@once
def test_a_decode_that_does_not_fit_in_tiles_either_fails_its_job(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(family, monkeypatch)
    decodes.fails = lambda latents, tiled: torch.OutOfMemoryError("simulated") if latents.shape[-1] > 16 else None
    large, small = run(make_engine(family), work(family, size=(64, 64), decode=True), work(family, decode=True))
    with pytest.raises(torch.OutOfMemoryError):
        large.result(0)
    assert small.result(0).shape == (1, 32, 32, 3)
    assert decodes.calls.count((1, True)) == 1


# Cancelling


def assert_cancelled(request: Request, reason: str) -> None:
    with pytest.raises(Cancelled) as stopped:
        request.result(0)
    assert stopped.value.reason == reason


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


# Text


def recorded_texts(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of ``family.encode`` from now on; texts with "bad" fail."""
    real, calls = family.encode, []

    def encode(texts: Sequence[str]) -> torch.Tensor:
        calls.append(list(texts))
        if any("bad" in text for text in texts):
            raise ValueError("no such letter")
        return real(texts)

    monkeypatch.setattr(family, "encode", encode)
    return calls


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


# The recorded forward


def counted(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, change: Denoise | None = None) -> list[int]:
    """The row counts of the calls of ``family.denoise`` from Python, from now on."""
    real, calls = family.denoise, []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        return (change or real)(latents, timesteps, states)

    monkeypatch.setattr(family, "denoise", denoise)
    return calls


def example_rows(family: StableDiffusion, count: int, size: tuple[int, int] = (32, 32)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *family.latent_shape(*size), generator=generator)
    return x, torch.linspace(10, 900, count), family.encode([f"thing {i}" for i in range(count)])


@torch.inference_mode()
def test_the_recorded_forward_gives_equal_results_at_other_row_counts_and_sizes(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = family.denoise
    calls = counted(family, monkeypatch)
    traced = Network(family)
    traced.trace(*example_rows(family, 2))
    del calls[:]
    for count, size in [(2, (32, 32)), (1, (32, 32)), (5, (48, 40)), (8, (32, 32)), (2, (32, 32)), (3, (64, 64))] * 2:
        rows = example_rows(family, count, size)
        assert torch.equal(traced(*rows)[0], eager(*rows))
    assert not calls, "Python was called: the recording is not in use"


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
@torch.inference_mode()
@once
def test_a_forward_that_cannot_be_recorded_runs_through_python_with_a_warning(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    real = family.denoise

    def change(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise error("not while tracing")
        return real(latents, timesteps, states)

    assert_falls_back(family, monkeypatch, caplog, change, f"cannot be recorded ({error.__name__})")


@torch.inference_mode()
@once
def test_a_recording_that_gives_other_results_is_not_used(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = family.denoise

    def change(latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        factor = 2.0 if int(latents.shape[0]) == 2 else 1.0  # decided while recording
        return real(latents, timesteps, states) * factor

    assert_falls_back(family, monkeypatch, caplog, change, "gives other results")


def assert_falls_back(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Denoise, message: str
) -> None:
    calls = counted(family, monkeypatch, change)
    net = Network(family)
    with caplog.at_level(logging.WARNING):
        net.trace(*example_rows(family, 2))
    assert message in caplog.text
    del calls[:]
    rows = example_rows(family, 5)
    assert torch.equal(net(*rows)[0], change(*rows))
    assert calls == [5]


# Warm-up and the thread


def test_warm_up_measures_memory_finds_a_row_budget_and_leaves_nothing_behind(family: StableDiffusion) -> None:
    engine = Engine(family, max_rows=16)
    engine.warm_up()
    key, _ = keys(family)
    footprint = engine.memory.footprint
    assert footprint is not None and footprint.row > 0 and footprint.decode > 0
    assert 1 <= engine.planner.cost.budget(key) <= 16
    assert engine.planner.cost.seconds(key, 1) > 0, "nothing was observed"
    assert engine.idle
    assert num_used(engine) == 0
    subject = work(family, steps=5, decode=True)
    assert torch.equal(run(engine, subject)[0].result(0), solo(family, subject))


@once
def test_warm_up_keeps_the_row_budget_within_memory(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, memory_limit_bytes=int(1.2 * needed_bytes(measured, own)))
    engine.warm_up()
    rows = engine.memory.num_rows(own, 64)
    assert 1 <= rows < 64
    assert engine.planner.cost.limit(own) == rows
    assert engine.idle and num_used(engine) == 0


@once
def test_warm_up_refuses_fixed_rows_that_do_not_fit(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    # Enough for the forward, were it not for the share that is kept for jobs between steps.
    limit = int(1.05 * needed_bytes(measured, own, rows=32))
    engine = make_engine(family, fixed_rows=32, memory_limit_bytes=limit)
    with pytest.raises(ConfigurationError, match=r"reproducible_rows: got 32; memory allows \d+$"):
        engine.warm_up()


@once
def test_warm_up_accepts_fixed_rows_that_fit(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, fixed_rows=32, memory_limit_bytes=int(1.5 * needed_bytes(measured, own, rows=32)))
    engine.warm_up()
    assert torch.isfinite(run(engine, work(family))[0].result(0)).all()


@once
def test_a_rows_footprint_is_that_of_one_row_in_the_reproducible_mode_too(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    engine.warm_up()
    assert engine.memory.row_bytes(own) <= 1.5 * measured.row_bytes(own)


@once
def test_many_threads_submit_and_cancel_while_the_engine_runs(family: StableDiffusion) -> None:
    engine = make_engine(family)
    start = threading.Barrier(8)
    requests: dict[int, list[Request]] = {}

    def client(number: int) -> None:
        start.wait()
        requests[number] = []
        for i in range(5):
            request = engine.submit(work(family, f"thing {number}", steps=3 + i, seeds=(number * 10 + i,), decode=i % 2 == 0))
            requests[number].append(request)
            if i == 4:
                request.cancel("changed my mind")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    engine.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in requests.values():
        for i, request in enumerate(mine):
            if i < 4:
                assert request.result(60).shape == ((1, 32, 32, 3) if i % 2 == 0 else (1, 4, 16, 16))
            else:
                request.future.exception(60)  # cancelled, or done before that was seen
    engine.stop()
    assert engine.idle
    assert num_used(engine) == 0
    assert_close(requests[3][1].result(0), solo(family, work(family, "thing 3", steps=4, seeds=(31,))))


@once
def test_stopping_decodes_what_is_denoised_and_cancels_the_rest(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, stopping = threading.Event(), threading.Event()
    decodes = Decodes(family, monkeypatch)

    def hold(latents: torch.Tensor, tiled: bool) -> Exception | None:
        entered.set()
        stopping.wait(60)
        return None

    decodes.fails = hold
    engine = make_engine(family, decode_batch=1)
    paid = engine.submit(work(family, "paid", steps=2, seeds=(1, 2, 3), decode=True))
    long = engine.submit(work(family, "long", steps=100))
    engine.start()
    assert entered.wait(60)
    waiting = engine.submit(work(family, "waiting"))
    engine.stop(timeout_s=0)  # only says so: the engine thread stands in the first of three decodes
    assert_cancelled(engine.submit(work(family, "refused")), "shutdown")
    stopping.set()
    engine.stop()
    assert paid.result(0).shape == (3, 32, 32, 3)
    for request in (long, waiting):
        assert_cancelled(request, "shutdown")
    assert num_used(engine) == 0
    assert long.checkpoint is not None
    assert long.checkpoint.step == long.step > 0


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_a_job_that_goes_on_from_a_checkpoint_gives_the_same_bits(family: StableDiffusion, subject: dict[str, Any]) -> None:
    one = work(family, **subject)
    expected = solo(family, one, fixed_rows=FIXED_ROWS)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    request = engine.submit(one)
    while request.step < 3:
        engine.step()
    data = engine.lanes[request.lane].snapshot(request).to_bytes(one)
    checkpoint = Checkpoint.from_bytes(data, one)
    assert checkpoint is not None and checkpoint.step == 3
    resumed = run(make_engine(family, fixed_rows=FIXED_ROWS), dataclasses.replace(one, resume=checkpoint))[0]
    assert torch.equal(resumed.result(0), expected)
