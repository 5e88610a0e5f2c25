"""Pictures of unfinished jobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from support.engines import (
    assert_close,
    make_engine,
    once,
    run,
    solo,
    work,
)

from latentline_worker.engine.preview import LatentToRgb
from latentline_worker.models.base import Row
from latentline_worker.models.sd import StableDiffusion
from latentline_worker.samplers import make_scheduler


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
    assert request.preview.pixels.dtype == np.uint8
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

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        outputs.append(real(latents, timesteps, rows))
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
