"""Each family, loaded from disk, in a batch of unlike jobs: the latents and pixels that its plain diffusers pipeline gives alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from support.engines import FIXED_ROWS, RELATIVE, drain, make_engine, run, snapshot, solo, work
from support.tiny_families import TINY, unpacked

from latentline.errors import InvalidRequest, ModelError
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.request import Work
from latentline_worker.models import registry
from latentline_worker.models.base import Family
from latentline_worker.samplers import make_scheduler

CPU = torch.device("cpu")
PIXELS = 2  # of 255
SIZE = 64
# (steps, guidance scale, images, negative prompt): jobs stand at other steps and leave at other times.
UNLIKE = [
    (4, 5.0, 1, "blurry"),
    (9, 3.0, 1, ""),
    (6, 0.0, 1, ""),
    (7, 7.5, 2, "bad"),
    (5, 2.0, 1, ""),
    (8, 1.5, 1, "dark"),
    (3, 4.0, 1, ""),
]


@pytest.fixture(scope="module", params=TINY)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Family]:
    """A plain pipeline, and the family that loads what it has saved."""
    pipeline = TINY[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("models") / request.param
    pipeline.save_pretrained(folder, safe_serialization=True)
    family = registry.load(str(folder), CPU, torch.float32)
    family.info = family.info.model_copy(update={"default_width": SIZE, "default_height": SIZE})  # FLUX.1's own would take long
    return pipeline, family


def alone(pipeline: Any, family: Family, one: Work, output: str = "latent") -> Any:
    """What the plain pipeline gives, drawing the noise of its sampler from the job's generator as well."""
    request, kept = one.request, pipeline.scheduler
    pipeline.scheduler = make_scheduler(request.scheduler, family.scheduler_config)  # type: ignore[attr-defined]
    # As from_config keeps what a class does not know: the pipeline reads from it how the shift depends on the size.
    kept_by_name = {name: value for name, value in family.scheduler_config.items() if name.endswith(("_shift", "_seq_len"))}  # type: ignore[attr-defined]
    pipeline.scheduler.register_to_config(**kept_by_name)
    if family.info.family == "sd" and not hasattr(pipeline.scheduler, "init_noise_sigma"):
        # What a stock StableDiffusionPipeline misses at the FlowMatch classes.
        pipeline.scheduler.init_noise_sigma, pipeline.scheduler.scale_model_input = 1.0, lambda x, _: x
    generators = [torch.Generator().manual_seed(seed) for seed in one.seeds]
    if family.info.family not in ("sd", "sdxl"):
        _take_what_it_can(pipeline.scheduler, bool(family.scheduler_config.get("use_dynamic_shifting")))  # type: ignore[attr-defined]
    if family.info.family in ("sd3", "flux", "z-image", "qwen-image"):
        # These pipelines give the scheduler no generator, so that a sampler's noise would come from the global one.
        noise = functools.partial(_noise, family, one, generators)
        patch = mock.patch.object(sys.modules[type(pipeline.scheduler).__module__], "randn_tensor", noise, create=True)
    else:
        patch = contextlib.nullcontext()  # type: ignore[assignment]
    options: dict[str, Any] = {"guidance_scale": request.guidance_scale}
    if family.info.negative_prompts:
        # diffusers tells no negative prompt from an empty one only by None, and SDXL gives zeros for the former.
        options["negative_prompt"] = [request.negative_prompt] * len(one.seeds) if request.negative_prompt else None
        if family.info.family == "qwen-image":  # is guided with a negative prompt only, and its guidance_scale is another
            options = {"true_cfg_scale": request.guidance_scale, "negative_prompt": [request.negative_prompt] * len(one.seeds)}
    elif not pipeline.transformer.config.guidance_embeds:
        options["max_sequence_length"] = 256  # schnell's own
    try:
        with patch:
            images = pipeline(
                [request.prompt] * len(one.seeds),
                num_inference_steps=request.num_inference_steps,
                width=request.width,
                height=request.height,
                generator=generators,
                output_type=output,
                **options,
            ).images
    finally:
        pipeline.scheduler = kept
    return unpacked(pipeline, images, request.width, request.height) if output == "latent" else images


def _noise(family: Family, one: Work, generators: list[torch.Generator], *_: Any, **__: Any) -> torch.Tensor:
    """Each image's noise from its own generator, in the shape of its latents; packed where the pipeline keeps them so."""
    shape = one.latent_shape
    drawn = torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])
    return FluxPipeline._pack_latents(drawn, len(drawn), *shape) if family.info.family in ("flux", "qwen-image") else drawn


def _take_what_it_can(scheduler: Any, shifts: bool) -> None:
    """The pipelines give every scheduler noise levels and a shift for the size, also one that takes none, or whose model does not shift.

    FluxPipeline alone leaves out the levels where a scheduler makes those of flow matching itself; here all do.
    """
    real = scheduler.set_timesteps

    def set_timesteps(steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None) -> None:
        given: dict[str, Any] = {"num_inference_steps": steps}
        if sigmas is not None:
            flow = scheduler.config.get("use_flow_sigmas")
            given = {"num_inference_steps": len(sigmas)} if flow else {"sigmas": sigmas}
        if mu is not None and scheduler.config.get("use_dynamic_shifting"):
            given["mu"] = mu
        elif mu is not None and shifts:
            scheduler.register_to_config(flow_shift=math.exp(mu))  # the formula of the schedulers that can
        real(device=device, **given)

    scheduler.set_timesteps = set_timesteps


def job(family: Family, scheduler: str, number: int, **options: Any) -> Work:
    steps, guidance, count, negative = UNLIKE[number % len(UNLIKE)]
    seeds = tuple(range(10 * number, 10 * number + count))
    negative = negative if family.info.negative_prompts else ""
    prompt = "thing " + "abcdefghi"[number] * (1 + 5 * number)  # texts of unlike lengths share a batch
    size = options.pop("size", (SIZE, SIZE))
    return work(family, prompt, scheduler, steps, guidance, seeds, size, negative_prompt=negative, **options)


def test_every_sampler_in_one_batch_and_resumed_equals_the_plain_pipeline(loaded: tuple[Any, Family]) -> None:
    pipeline, family = loaded
    works = [job(family, name, number % 8) for number, name in enumerate(family.info.schedulers)]
    engine, coming, requests, halfway = make_engine(family), list(works), [], {}
    while coming or not engine.idle:
        if coming:  # each joins a step after the last
            requests.append(engine.submit(coming.pop(0)))
        engine.step()
        for request in requests:
            if request.slots and request.step >= request.num_steps // 2 and request not in halfway:
                halfway[request] = snapshot(engine, request).to_bytes(request.work)
    assert engine.num_shared_steps > len(works), "they ran alone: the test shows nothing"
    assert len(halfway) == len(works)
    resumed = [dataclasses.replace(one.work, resume=Checkpoint.from_bytes(data, one.work)) for one, data in halfway.items()]
    assert all(one.resume is not None and 0 < one.resume.step < one.table.num_steps for one in resumed)
    again = dict(zip(halfway, run(make_engine(family), *resumed), strict=True))
    for one, request in zip(works, requests, strict=True):
        expected = alone(pipeline, family, one)
        for way, result in (("", request), ("resumed", again[request])):
            error = (result.result(0) - expected).abs().max() / expected.abs().max()
            assert error <= RELATIVE, f"{one.request.scheduler} {way}: {error:.1e}"


def test_pixels_equal_the_plain_pipelines(loaded: tuple[Any, Family]) -> None:
    pipeline, family = loaded
    works = [job(family, family.info.default_scheduler if i % 2 else "unipc", i, decode=True) for i in range(3)]
    for one, request in zip(works, run(make_engine(family), *works), strict=True):
        expected = alone(pipeline, family, one, "np")
        assert np.abs(request.result(0).numpy() - expected * 255).max() <= PIXELS


def test_resumed_and_in_any_company_it_is_equal_to_the_bit(loaded: tuple[Any, Family]) -> None:
    _, family = loaded
    subject = job(family, family.info.default_scheduler, 1)
    expected = solo(family, subject, fixed_rows=FIXED_ROWS)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    engine.warm_up()
    engine.submit(job(family, "unipc", 3))
    request = engine.submit(subject)
    while request.step < 4:
        engine.step()
    data = snapshot(engine, request).to_bytes(subject)
    drain(engine)
    assert request.shared_steps > 0 and torch.equal(request.result(0), expected)
    resumed = dataclasses.replace(subject, resume=Checkpoint.from_bytes(data, subject))
    assert resumed.resume is not None and torch.equal(solo(family, resumed, fixed_rows=FIXED_ROWS), expected)


def test_the_forward_is_recorded_for_every_size(loaded: tuple[Any, Family], caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU the network runs through a recording; one that would differ for other sizes is not used, with a warning."""
    pipeline, family = loaded
    engine = make_engine(family, max_rows=2)
    engine.warm_up()
    assert not [record for record in caplog.records if "recorded" in record.getMessage()]
    for size in ((SIZE, SIZE), (SIZE, SIZE // 2), (SIZE // 2, SIZE)):
        one = job(family, "dpmpp_2m", 1, size=size)
        expected = alone(pipeline, family, one)
        assert (run(engine, one)[0].result(0) - expected).abs().max() <= RELATIVE * expected.abs().max(), size


def test_a_scheduler_without_meaning_is_refused_with_those_that_have_one(loaded: tuple[Any, Family]) -> None:
    _, family = loaded
    if "ddim" in family.info.schedulers:
        pytest.skip("every name has a meaning for it")
    with pytest.raises(InvalidRequest, match=r"scheduler.*ddim.*euler"):
        job(family, "ddim", 0)


def test_a_negative_prompt_that_would_have_no_effect_is_refused(loaded: tuple[Any, Family]) -> None:
    _, family = loaded
    if family.info.negative_prompts:
        pytest.skip("it has one")
    with pytest.raises(InvalidRequest, match=r"negative_prompt.*has no use for one"):
        work(family, scheduler="euler", size=(SIZE, SIZE), negative_prompt="blurry")


def test_a_text_that_is_cut_is_not_logged(loaded: tuple[Any, Family], caplog: pytest.LogCaptureFixture) -> None:
    _, family = loaded
    one = work(family, "secret " * 300, size=(SIZE, SIZE))
    with torch.inference_mode():
        (encoded, *_) = family.encode(one.texts)
    assert encoded.tokens[0] > encoded.tokens[1], "it was not cut: the test shows nothing"
    assert "s e c r e t" not in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("missing", ["model_index.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_a_folder_with_a_file_missing_is_refused_by_its_name(name: str, missing: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path, safe_serialization=True)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=missing.split("/")[0]):
        registry.load(str(tmp_path), CPU, torch.float32)


def test_a_pipeline_of_no_known_family_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ModelError, match=r"WanPipeline.*allowed: StableDiffusionPipeline, "):
        registry.load(str(tmp_path), CPU, torch.float32)
