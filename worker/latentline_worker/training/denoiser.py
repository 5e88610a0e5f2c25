"""Train a latent denoiser: a U-Net with cross-attention on the states of a frozen text encoder.

Classifier-free guidance comes from dropped captions (Ho and Salimans 2022, arXiv:2207.12598). What is predicted, and
at which times, is ``objectives``' business. ``addition_embed_type="text"`` in the recipe's model adds the pooled
caption to the time embedding, which binds colours and backgrounds sooner than cross-attention alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .autoencoder import CPU
from .latents import LatentCache
from .objectives import draw_times, make_scheduler, noised
from .recipe import Objective
from .seeds import torch_random
from .sheets import save_sheet, to_images, to_tensor

NUM_MEASURED = 128  # held-out pictures for the loss
NUM_SHOWN = 16
SHEET_STEPS, SHEET_GUIDANCE = 20, 3.0


class DenoiserTask:
    """Denoiser training as the loop takes it.

    Args:
        cache: latents and caption states of the training data.
        model: the U-Net to train.
    """

    def __init__(self, recipe: Objective, cache: LatentCache, model: torch.nn.Module, device: torch.device = CPU) -> None:
        self.recipe, self.cache, self.device = recipe, cache, device
        self.model: Any = model.to(device)
        self.inputs = {"latents": cache.folder.name}
        self.held_out: tuple[torch.Tensor, torch.Tensor] | None = None

    def loss(self, step: int, rank: int) -> torch.Tensor:
        """Mean squared error of the prediction on one batch."""
        recipe, seed = self.recipe, self.recipe.schedule.seed
        x0, text = self.cache.batch(seed, step, rank, recipe.schedule.batch, num_shards(recipe, step), recipe.caption_dropout)
        return self._error(x0, text, step, torch_random(seed, step, rank, "noise"))

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Held-out captions drawn with the averaged weights, and the loss on held-out pictures with fixed noise."""
        if self.held_out is None:
            pairs = self.cache.source.held_out_pairs(NUM_MEASURED)
            self.held_out = self.cache.encode(to_tensor([image for image, _ in pairs])), self.cache.states([words for _, words in pairs])
        x0, text = self.held_out
        # Times of the last part's density, so that the figures of a whole training can be compared.
        loss = self._error(x0, text, self.recipe.schedule.steps - 1, torch_random(0, 0, 0, "held-out noise"))
        z = self.draw(text[:NUM_SHOWN])
        pixels = self.cache.decode(z)
        save_sheet(folder / "samples" / f"step-{step:06}.png", to_images(pixels), columns=8)
        return {"held_out_loss": float(loss)}

    def draw(self, text: torch.Tensor, steps: int = SHEET_STEPS, guidance: float = SHEET_GUIDANCE) -> torch.Tensor:
        """Scaled latents on the CPU for text states (n, tokens, width), by guided sampling from fixed noise."""
        scheduler = make_scheduler(self.recipe.prediction)
        scheduler.set_timesteps(steps)
        z = torch.randn(len(text), *self.shape(), generator=torch_random(0, 0, 0, "sheet"))
        both = torch.cat([self.cache.empty.expand_as(text), text])
        for t in scheduler.timesteps:
            without, with_text = self.model(torch.cat([z, z]).to(self.device), t, both.to(self.device)).sample.cpu().chunk(2)
            z = scheduler.step(without + guidance * (with_text - without), t, z).prev_sample
        return z

    def finish(self, folder: Path) -> dict[str, float]:
        """Write ``folder/denoiser`` and ``folder/scheduler``."""
        self.model.save_pretrained(folder / "denoiser")
        make_scheduler(self.recipe.prediction).save_pretrained(folder / "scheduler")
        return self.sample(folder, self.recipe.schedule.steps)

    def _error(self, x0: torch.Tensor, text: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
        u = draw_times(self.recipe, step, len(x0), generator)
        e = torch.randn(x0.shape, generator=generator)
        x, t, target = noised(self.recipe.prediction, x0, e, u)
        predicted = self.model(x.to(self.device), t.to(self.device), text.to(self.device)).sample
        return F.mse_loss(predicted.float(), target.to(self.device))

    def shape(self) -> tuple[int, int, int]:
        """Of one sample: channels, height, width."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size


def num_shards(recipe: Objective, step: int) -> int:
    """How many pictures of each item are in use at a step: a few at first, one more from time to time, then all."""
    return min(recipe.compositions, recipe.first_compositions + step // recipe.next_composition_steps)
