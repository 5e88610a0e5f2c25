"""Checks before a training begins: the parts fit each other, and all of it fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import memory
from .autoencoder import make_model, reconstruction_loss
from .distill import DistillRecipe
from .errors import TrainingError
from .latents import LatentCache
from .lora import LoraRecipe
from .recipe import AutoencoderRecipe, DenoiserRecipe


def check_autoencoder(made: AutoencoderRecipe, device: torch.device) -> None:
    """Raises: TrainingError: the training does not fit into memory."""
    shape = (made.schedule.batch, 3, made.crop_px, made.crop_px)

    def run() -> torch.Tensor:
        model: Any = make_model(made.model, 0)
        x = torch.zeros(shape)
        encoded = model.encode(x)
        return reconstruction_loss(model.decode(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).sample, x)

    with torch.device("meta"):
        weights = memory.weights_bytes(make_model(made.model, 0), made.schedule.ema_decay > 0)
    memory.check(weights + memory.activation_bytes(run), "the autoencoder's training", memory.free_bytes(device))


def check_denoiser(made: DenoiserRecipe, cache: LatentCache, device: torch.device) -> None:
    """Raises: TrainingError: the model does not take this autoencoder's latents or this text encoder's states, or
    it does not fit into memory."""
    _check_denoiser(lambda: make_model(made.model, 0), made, cache, "the denoiser's training", device)


def check_copy(made: DistillRecipe | LoraRecipe, cache: LatentCache, model: Any, device: torch.device) -> None:
    """For trainings that begin with a denoiser and keep it beside what they train; raises as :func:`check_denoiser`.

    An adapter's own weights are few: the distillation's bound holds for it as well.
    """
    _check_denoiser(lambda: type(model).from_config(model.config), made, cache, "the training", device)


def _check_denoiser(
    make: Callable[[], Any], made: DenoiserRecipe | DistillRecipe | LoraRecipe, cache: LatentCache, what: str, device: torch.device
) -> None:
    z = cache.encode(torch.zeros(1, 3, made.size_px, made.size_px))
    batch, tokens, width = made.schedule.batch, *cache.empty.shape

    def run() -> torch.Tensor:
        loss: torch.Tensor = make()(torch.zeros(batch, *z.shape[1:]), torch.zeros(batch), torch.zeros(batch, tokens, width)).sample.sum()
        return loss

    with torch.device("meta"):
        model = make()
    _check_shapes(model, z, width)
    needed = memory.weights_bytes(model, made.schedule.ema_decay > 0) + memory.activation_bytes(run)
    needed += cache.source.num_items * made.compositions * z[0].numel() * 2
    memory.check(needed, what, memory.free_bytes(device))


def _check_shapes(model: Any, z: torch.Tensor, width: int) -> None:
    config = model.config
    if (config.in_channels, config.out_channels, config.sample_size) != (z.shape[1], z.shape[1], z.shape[2]):
        raise TrainingError(
            f"model: in_channels, out_channels and sample_size must be {z.shape[1]}, {z.shape[1]}, {z.shape[2]} for this autoencoder"
        )
    if config.cross_attention_dim != width:
        raise TrainingError(f"model.cross_attention_dim: got {config.cross_attention_dim}; the text encoder's states have {width}")
