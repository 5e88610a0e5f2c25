"""What a denoiser learns: the noised latent, the timestep and the target, for three kinds of prediction.

====================  ==========================================  ================================================
prediction            noised latent, target                       paper
====================  ==========================================  ================================================
``flow``              x = (1 - s) x0 + s e, target e - x0         Liu et al. 2022 (arXiv:2209.03003)
``v_prediction``      DDPM schedule, v = sqrt(a) e - sqrt(1-a) x0  Salimans and Ho 2022 (arXiv:2202.00512)
``epsilon``           DDPM schedule, target e                     Ho et al. 2020 (arXiv:2006.11239)
====================  ==========================================  ================================================

The logit of the time u in 0..1 is normal (Esser et al. 2024, arXiv:2403.03206), where u = 1 is pure noise. The
flow takes s = u; the others take the timestep next to 1000 u.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from .recipe import Objective

NUM_TIMESTEPS = 1000
# The linear schedule of DDPM: its last step keeps next to no signal, so that plain backgrounds can take any colour.
DDPM = {"num_train_timesteps": NUM_TIMESTEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def draw_times(recipe: Objective, step: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) times u in 0..1 at a step, by the density that the recipe gives for this part of the training."""
    share = step / recipe.schedule.steps
    mean = next(m for m, until in zip(recipe.density_mean, recipe.density_until, strict=True) if share < until or until == 1.0)
    return torch.sigmoid(mean + recipe.density_std * torch.randn(count, generator=generator))


def noised(prediction: str, x0: torch.Tensor, e: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The network's input, its timestep (n,) and its target.

    Args:
        x0: clean latents, (n, channels, height, width).
        e: noise of the same shape.
        u: times in 0..1, (n,).
    """
    if prediction == "flow":
        s = u.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * e, u * NUM_TIMESTEPS, e - x0
    schedule = DDPMScheduler(**DDPM)
    t = (u * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
    target = e if prediction == "epsilon" else schedule.get_velocity(x0, e, t)
    return schedule.add_noise(x0, e, t), t, target


def make_scheduler(prediction: str) -> Any:
    """A scheduler of diffusers that samples this prediction in a stock ``StableDiffusionPipeline``."""
    if prediction == "flow":
        flow = {"num_train_timesteps": NUM_TIMESTEPS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return DPMSolverMultistepScheduler(**flow, steps_offset=1)
    # "trailing" begins at the noisiest timestep, which few steps need (Lin et al. 2023, arXiv:2305.08891); another
    # steps_offset than 1 makes pipelines warn.
    return DPMSolverMultistepScheduler(**DDPM, prediction_type=prediction, timestep_spacing="trailing", steps_offset=1)
