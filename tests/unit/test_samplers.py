"""Compiled tables against the diffusers schedulers they were read from."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
)

from latentline.jobs import SCHEDULERS
from latentline_worker.samplers import MAX_ORDER, CompileError, compile_scheduler, make_scheduler, sampler_table
from latentline_worker.samplers.presets import PRESETS

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BUNDLED = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def test_presets_are_the_contracts_schedulers() -> None:
    assert tuple(PRESETS) == SCHEDULERS


@pytest.mark.parametrize("config", [SD15, BUNDLED], ids=["sd15", "bundled"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_follows_the_scheduler(name: str, steps: int, config: dict[str, Any]) -> None:
    """A trajectory with a network that depends on the latents, as a real one does."""
    table = sampler_table(name, config, steps)
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma))

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(x) + x.flip(-1) * 0.3 + t / 1000

    x, noise = first.clone(), torch.Generator().manual_seed(2)
    given = {"generator": noise, "eta": 0.0}  # as diffusers' pipelines do
    extra = {key: given[key] for key in inspect.signature(scheduler.step).parameters if key in given}
    for t in scheduler.timesteps:
        m = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(m, t, x, return_dict=False, **extra)[0]

    noise = torch.Generator().manual_seed(2)
    xs, ms = [first.double()], []
    for n in range(table.num_steps):
        ms.insert(0, network(xs[0] * table.input_scale[n], table.timesteps[n]))
        a, b, c = np.split(table.coefficients[n], [MAX_ORDER, 2 * MAX_ORDER])
        new = sum(a[j] * xs[j] + b[j] * ms[j] for j in range(min(MAX_ORDER, n + 1)))
        if table.draws[n]:
            new = new + c[0] * torch.randn(first.shape, generator=noise)
        xs.insert(0, new)
    assert (xs[0] - x).abs().max() <= 1e-4 * x.abs().max()


def test_clipping_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match="clip_sample=True"):
        sampler_table("ddim", {**SD15, "clip_sample": True}, 10)


def test_thresholding_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match="thresholding=True"):
        sampler_table("unipc", {**SD15, "thresholding": True}, 10)


def test_a_scheduler_that_is_not_linear_is_found_out() -> None:
    class Clamped(DDIMScheduler):
        def step(self, m: torch.Tensor, t: int, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
            return (super().step(m, t, x, **options)[0].clamp(-2, 2),)

    scheduler = Clamped(**SD15, clip_sample=False)
    with pytest.raises(CompileError, match="not linear"):
        compile_scheduler(scheduler, 5)


def test_a_step_count_the_scheduler_refuses() -> None:
    with pytest.raises(CompileError, match="refuses 2000 steps"):
        sampler_table("ddim", SD15, 2000)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), CMStochasticIterativeScheduler(), CogVideoXDPMScheduler(), KarrasVeScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_are_refused_with_a_reason(scheduler: Any) -> None:
    with pytest.raises(CompileError, match=type(scheduler).__name__):
        compile_scheduler(scheduler, 5)


def test_clean_latents_are_read_off_the_network(config: dict[str, Any] = SD15) -> None:
    """With a network that knows the noise, every call points to the same clean latents."""
    table = sampler_table("euler", config, 10)
    alpha_bar = make_scheduler("ddim", config).alphas_cumprod.double().numpy()
    clean, noise = np.linspace(-1, 1, 5), np.linspace(2, -2, 5)
    for n, t in enumerate(table.timesteps):
        a = np.interp(t, np.arange(1000), alpha_bar)
        seen = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
        assert np.allclose(table.denoised[n, 0] * seen + table.denoised[n, 1] * noise, clean)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(CompileError, match="known: ddim, ddpm"):
        make_scheduler("heun3", SD15)
