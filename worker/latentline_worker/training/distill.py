"""Distil a rectified flow into a few steps: piecewise rectified flow.

PeRFlow (Yan et al. 2024, arXiv:2405.07510) cuts time into windows. In each of them the teacher's path, which is
solved from the window's noisy end, is replaced by the straight line between its ends, and the student learns that line's
velocity. One Euler step a window then follows the student's path. Guidance is the teacher's: the student is sampled
without it, at half the cost of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler

from .autoencoder import CPU
from .denoiser import NUM_MEASURED, NUM_SHOWN
from .errors import TrainingError
from .latents import LatentCache, fingerprint
from .objectives import NUM_TIMESTEPS
from .recipe import Schedule, at_least
from .seeds import torch_random
from .sheets import save_sheet, to_images, to_tensor


@dataclass(frozen=True)
class DistillRecipe:
    """A distillation.

    Args:
        windows: pieces of the path, and steps of the student.
        solver_steps: Euler steps of the teacher in one window; each is a guided step, two passes of the network.
        guidance: the teacher's guidance scale, which becomes part of the student.
        compositions: cached pictures of each item that are used.
    """

    schedule: Schedule
    size_px: int = 128
    windows: int = 4
    solver_steps: int = 4
    guidance: float = 3.0
    compositions: int = 8

    def check(self) -> None:
        """Raises: TrainingError: a value makes no sense; the message names it."""
        self.schedule.check()
        at_least(self, size_px=16, windows=1, solver_steps=1, guidance=0.0, compositions=1)


def make_scheduler() -> Any:
    """Euler steps on equal parts of the time, in a stock ``StableDiffusionPipeline``: DPM-Solver of the first order."""
    flow = {"num_train_timesteps": NUM_TIMESTEPS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return DPMSolverMultistepScheduler(**flow, solver_order=1, steps_offset=1)


class DistillTask:
    """Distillation as the loop takes it.

    Args:
        cache: latents and caption states of the training data.
        teacher: a U-Net of diffusers that predicts the velocity of rectified flow; the student begins as a copy of it.
    """

    def __init__(self, recipe: DistillRecipe, cache: LatentCache, teacher: Any, device: torch.device = CPU) -> None:
        self.recipe, self.cache, self.device = recipe, cache, device
        self.inputs = {"latents": cache.folder.name, "denoiser": fingerprint(teacher)}
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.model: Any = type(teacher).from_config(teacher.config).to(device)
        self.model.load_state_dict(teacher.state_dict())
        self.held_out: tuple[torch.Tensor, torch.Tensor] | None = None

    def loss(self, step: int, rank: int) -> torch.Tensor:
        """Mean squared error of the student's velocity on one batch, against the straight line in each picture's window."""
        seed, count = self.recipe.schedule.seed, self.recipe.schedule.batch
        x0, text = self.cache.batch(seed, step, rank, count, self.recipe.compositions, 0.0)
        return self._error(x0, text, torch_random(seed, step, rank, "distillation"))

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Held-out captions drawn in as many steps as windows, and the loss on held-out pictures with fixed noise."""
        if self.held_out is None:
            pairs = self.cache.source.held_out_pairs(NUM_MEASURED)
            self.held_out = self.cache.encode(to_tensor([image for image, _ in pairs])), self.cache.states([words for _, words in pairs])
        x0, text = self.held_out
        loss = self._error(x0, text, torch_random(0, 0, 0, "held-out noise"))
        pixels = self.cache.decode(self.draw(text[:NUM_SHOWN]))
        save_sheet(folder / "samples" / f"step-{step:06}.png", to_images(pixels), columns=8)
        return {"held_out_loss": float(loss)}

    @torch.no_grad()
    def draw(self, text: torch.Tensor) -> torch.Tensor:
        """Scaled latents on the CPU for text states (n, tokens, width): one step a window, from fixed noise."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(self.recipe.windows)
        config = self.model.config
        z = torch.randn(len(text), config.in_channels, config.sample_size, config.sample_size, generator=torch_random(0, 0, 0, "sheet"))
        for t in scheduler.timesteps:
            velocity = self.model(z.to(self.device), t, text.to(self.device)).sample.cpu()
            z = scheduler.step(velocity, t, z).prev_sample
        return z

    def finish(self, folder: Path) -> dict[str, float]:
        """Write ``folder/denoiser`` and ``folder/scheduler``."""
        self.model.save_pretrained(folder / "denoiser")
        make_scheduler().save_pretrained(folder / "scheduler")
        return self.sample(folder, self.recipe.schedule.steps)

    def _error(self, x0: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        windows = self.recipe.windows
        start = (torch.randint(windows, (len(x0),), generator=generator) + 1) / windows
        share = torch.rand(len(x0), generator=generator)  # of the window that lies behind, from its noisy end
        e = torch.randn(x0.shape, generator=generator)
        x0, text, e, start, share = (one.to(self.device) for one in (x0, text, e, start, share))
        s = start.view(-1, 1, 1, 1)
        begin = (1 - s) * x0 + s * e
        end = self._solve(begin, start, text)
        velocity = (begin - end) * windows
        x = begin - share.view(-1, 1, 1, 1) / windows * velocity
        predicted = self.model(x, (start - share / windows) * NUM_TIMESTEPS, text).sample
        return F.mse_loss(predicted.float(), velocity)

    @torch.no_grad()
    def _solve(self, x: torch.Tensor, start: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The teacher's guided path from each picture's time ``start``, (n,), to the end of its window."""
        width = 1 / (self.recipe.windows * self.recipe.solver_steps)
        both = torch.cat([self.cache.empty.to(text).expand_as(text), text])
        for n in range(self.recipe.solver_steps):
            t = (start - n * width) * NUM_TIMESTEPS
            without, with_text = self.teacher(torch.cat([x, x]), torch.cat([t, t]), both).sample.float().chunk(2)
            x = x - width * (without + self.recipe.guidance * (with_text - without))
        return x


def check_teacher(prediction: str | None, where: Path) -> None:
    """Raises: TrainingError: the denoiser is known to predict something else than the velocity of rectified flow."""
    if prediction not in (None, "flow"):
        raise TrainingError(f"{where}: predicts {prediction}; only a rectified flow (flow) can be distilled in windows")
