"""A job in a mixed batch of the engine gives the same latents as a plain diffusers pipeline."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support import engines

from latentline.errors import NumericalError
from latentline.jobs import SCHEDULERS
from latentline_worker.engine.conditioning import Conditioner
from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.planner import Planner
from latentline_worker.engine.request import Cancelled, Work
from latentline_worker.models.base import Row, Text
from latentline_worker.models.sd import StableDiffusion
from latentline_worker.samplers import make_scheduler

RELATIVE = 1e-4  # fp32: what the contract promises against solo runs


def work(family: StableDiffusion, prompt: str, scheduler: str, steps: int, guidance: float, seeds: tuple[int, ...], **options: Any) -> Work:
    return engines.work(family, prompt, scheduler, steps, guidance, seeds, **options)


def alone(
    pipeline: StableDiffusionPipeline, prompt: str, scheduler: str, steps: int, guidance: float, seeds: tuple[int, ...]
) -> torch.Tensor:
    kept, pipeline.scheduler = pipeline.scheduler, make_scheduler(scheduler, pipeline.scheduler.config)
    try:
        result = pipeline(
            [prompt] * len(seeds),
            negative_prompt=["blurry"] * len(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=32,
            height=32,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        )
    finally:
        pipeline.scheduler = kept
    return result.images


class Everything(CostModel):
    """As many rows as there are: which jobs meet then does not depend on this machine's timings."""

    def budget(self, lane: Hashable) -> int:
        return self.limit(lane)


@pytest.fixture
def engine(family: StableDiffusion) -> Iterator[Engine]:
    engine = Engine([family])
    engine.planner = Planner(Everything(64))
    yield engine
    engine.stop()


# Nine unlike jobs: other step counts, samplers, guidance (one has none), image counts.
MATES = [
    ("ddim", 4, 7.5, (1,)),
    ("euler", 9, 3.0, (2,)),
    ("euler_ancestral", 13, 1.0, (3,)),
    ("dpmpp_2m", 20, 5.0, (4, 5)),
    ("dpmpp_2m_karras", 7, 2.0, (6,)),
    ("unipc", 11, 9.0, (7,)),
    ("lcm", 4, 1.5, (8,)),
    ("heun", 5, 4.0, (9,)),
    ("sa_solver", 6, 3.0, (10,)),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_mixed_batch_equals_plain_pipeline(
    scheduler: str, pipeline: StableDiffusionPipeline, family: StableDiffusion, engine: Engine
) -> None:
    subject = engine.submit(work(family, "a cat", scheduler, 10, 6.0, (42, 43)))
    mates = [engine.submit(work(family, f"thing {i}", *mate)) for i, mate in enumerate(MATES)]
    engine.start()
    latents = subject.result(120)
    for mate in mates:
        mate.result(120)
    expected = alone(pipeline, "a cat", scheduler, 10, 6.0, (42, 43))
    assert subject.shared_steps > 0, "the subject ran alone: the test shows nothing"
    assert (latents - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_unguided_job_equals_plain_pipeline(pipeline: StableDiffusionPipeline, family: StableDiffusion, engine: Engine) -> None:
    subject = engine.submit(work(family, "a dog", "euler", 8, 1.0, (3,)))
    engine.submit(work(family, "a hat", "ddim", 5, 4.0, (4,)))
    engine.start()
    latents = subject.result(60)  # before the pipeline runs: both use one tokenizer, which is not thread-safe
    expected = alone(pipeline, "a dog", "euler", 8, 1.0, (3,))
    assert (latents - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_prompt_embeds_equal_the_pipelines(pipeline: StableDiffusionPipeline, family: StableDiffusion) -> None:
    expected, _ = pipeline.encode_prompt("a red cat", "cpu", 1, False)
    conditioner = Conditioner()
    conditioner.encode_some([(family, Text("a dog")), (family, Text("a red cat"))])
    known = conditioner.get(family, Text("a red cat"))
    assert known is not None and (known.row["prompt_embeds"] - expected[0]).abs().max() <= RELATIVE * expected.abs().max()


def test_decode_equals_the_pipelines(pipeline: StableDiffusionPipeline, family: StableDiffusion) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pixels = family.decode(latents, tiled=False).numpy()
    expected = pipeline.image_processor.postprocess(image, output_type="np")
    assert (abs(pixels / 255 - expected) <= 0.5 / 255 + 1e-6).all()


def test_cancel_frees_the_row_and_leaves_the_mates(family: StableDiffusion, engine: Engine) -> None:
    victim = engine.submit(work(family, "a", "ddim", 50, 5.0, (1,)))
    mate = engine.submit(work(family, "b", "ddim", 10, 5.0, (2,)))
    engine.step()
    engine.step()
    victim.cancel("cancel")
    engine.step()
    with pytest.raises(Cancelled) as stopped:
        victim.result(0)
    assert stopped.value.reason == "cancel"
    assert (victim.step, mate.step, mate.batch_jobs) == (2, 3, 1)
    for _ in range(7):
        engine.step()
    assert torch.isfinite(mate.result(0)).all()


def test_a_job_that_joins_late_shares_the_next_step(family: StableDiffusion, engine: Engine) -> None:
    first = engine.submit(work(family, "a", "euler", 6, 5.0, (1,)))
    engine.step()
    late = engine.submit(work(family, "b", "ddim", 3, 5.0, (2,)))
    engine.step()
    assert (first.step, late.step, first.batch_jobs) == (2, 1, 2)


def test_one_failing_job_leaves_the_others(family: StableDiffusion, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good = engine.submit(work(family, "a", "ddim", 3, 5.0, (1,)))
    bad = engine.submit(work(family, "b", "ddim", 3, 5.0, (2,)))
    poison = engines.embeds(family, "b")[0]
    real = family.denoise

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        if any(torch.allclose(row, poison, atol=1e-4) for row in rows["prompt_embeds"]):
            raise RuntimeError("poison")
        return real(latents, timesteps, rows)

    monkeypatch.setattr(family, "denoise", denoise)
    for _ in range(3):
        engine.step()
    assert torch.isfinite(good.result(0)).all()
    with pytest.raises(RuntimeError, match="poison"):
        bad.result(0)


def test_numbers_that_are_not_finite_fail_their_job_alone(family: StableDiffusion, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "encode", engines.encoded_times(family, lambda prompt: float("nan") if prompt == "b" else 1.0))
    good = engine.submit(work(family, "a", "ddim", 3, 5.0, (1,)))
    bad = engine.submit(work(family, "b", "ddim", 3, 5.0, (2,)))
    for _ in range(3):
        engine.step()
    assert torch.isfinite(good.result(0)).all()
    with pytest.raises(NumericalError):
        bad.result(0)


def test_stop_cancels_what_is_in_flight(family: StableDiffusion, engine: Engine) -> None:
    request = engine.submit(work(family, "a", "ddim", 100, 5.0, (1,)))
    engine.start()
    engine.stop()
    with pytest.raises(Cancelled, match="shutdown"):
        request.result(10)
    with pytest.raises(Cancelled, match="shutdown"):
        engine.submit(request.work).result(10)
