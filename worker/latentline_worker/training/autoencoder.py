"""Train an autoencoder: pixels to latents and back, ``AutoencoderTiny`` or ``AutoencoderKL`` in diffusers format.

Reconstruction is L1 on pixels, on their differences (edges) and on a low-pass (colour). The variational one adds
the Kullback-Leibler term of Kingma and Welling 2013 (arXiv:1312.6114), as Rombach et al. 2022 (arXiv:2112.10752)
use it. Latents get a penalty on mean and spread of each channel, because a pipeline scales all channels by one
number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from .recipe import AutoencoderRecipe
from .seeds import python_random, torch_random
from .sheets import save_sheet, to_images, to_tensor
from .sources import Source

NUM_MEASURED = 256  # held-out pictures for the PSNR
NUM_SHOWN = 24
CPU = torch.device("cpu")


def make_model(arguments: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model of diffusers with fresh weights that depend on the seed alone."""
    torch.manual_seed(seed)
    cls = getattr(diffusers, arguments["class"])
    model: torch.nn.Module = cls(**{name: value for name, value in arguments.items() if name != "class"})
    return model


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on horizontal and vertical differences, and on 4x4 means; (n, 3, height, width) -> scalar."""
    edges = F.l1_loss(output.diff(dim=2), target.diff(dim=2)) + F.l1_loss(output.diff(dim=3), target.diff(dim=3))
    return F.l1_loss(output, target) + edges + F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))


def moment_penalty(z: torch.Tensor) -> torch.Tensor:
    """How far each channel of (n, channels, height, width) is from mean 0 and deviation 1; scalar."""
    mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    return (mean.square() + (deviation - 1).square()).mean()


def psnr_db(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB; (n, 3, height, width) in -1..1 -> (n,)."""
    error: torch.Tensor = (output.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


class AutoencoderTask:
    """Autoencoder training as the loop takes it."""

    def __init__(self, recipe: AutoencoderRecipe, source: Source, model: torch.nn.Module | None = None, device: torch.device = CPU) -> None:
        self.recipe, self.source, self.device = recipe, source, device
        made = model if model is not None else make_model(recipe.model, recipe.schedule.seed)
        # On a CPU this layout is a third faster for convolutions of this kind.
        self.model: Any = made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inputs: dict[str, str] = {}
        self.variational = recipe.model["class"] == "AutoencoderKL"

    def loss(self, step: int, rank: int) -> torch.Tensor:
        """The loss on one batch of random crops."""
        recipe, seed = self.recipe, self.recipe.schedule.seed
        images = self.source.batch(seed, step, rank, recipe.schedule.batch)
        rng = python_random(seed, step, rank, "crops")
        slack = recipe.size_px - recipe.crop_px
        corners = [(rng.randint(0, slack), rng.randint(0, slack)) for _ in images]
        x = to_tensor([image.crop((a, b, a + recipe.crop_px, b + recipe.crop_px)) for image, (a, b) in zip(images, corners, strict=True)])
        x = x.to(self.device, memory_format=torch.channels_last)
        if self.variational:
            posterior = self.model.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=torch_random(seed, step, rank, "posterior")
            ).to(x)
            extra: torch.Tensor = recipe.kl_weight * posterior.kl().mean()
        else:
            z = self.model.encode(x).latents
            extra = z.new_zeros(())
        loss = reconstruction_loss(self.model.decode(z).sample, x) + recipe.moment_weight * moment_penalty(z) + extra
        return loss

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Held-out pictures above their reconstructions, and the PSNR."""
        x = to_tensor(self.source.held_out(NUM_MEASURED))
        z = self.encode(x)
        output = self.decode(z)
        pairs = [image for a, b in zip(to_images(x[:NUM_SHOWN]), to_images(output[:NUM_SHOWN]), strict=True) for image in (a, b)]
        save_sheet(folder / "samples" / f"step-{step:06}.png", pairs, columns=8)
        deviations = z.std(dim=(0, 2, 3))
        return {
            "psnr_db": float(psnr_db(output, x).mean()),
            "latent_std_min": float(deviations.min()),
            "latent_std_max": float(deviations.max()),
        }

    def finish(self, folder: Path) -> dict[str, float]:
        """Write ``folder/autoencoder`` with the scaling factor that brings training latents to unit variance."""
        z = self.encode(to_tensor(self.source.batch(self.recipe.schedule.seed, 0, 0, NUM_MEASURED)))
        self.model.register_to_config(scaling_factor=round(1.0 / float(z.std()), 5))
        self.model.save_pretrained(folder / "autoencoder")
        return {"scaling_factor": self.model.config.scaling_factor, **self.sample(folder, self.recipe.schedule.steps)}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) in -1..1 -> latents (n, channels, size / f, size / f), in small batches, back on the CPU."""
        return torch.cat([encode(self.model, part.to(self.device)).cpu() for part in x.split(32)])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return torch.cat([self.model.decode(part.to(self.device)).sample.cpu() for part in z.split(32)])


def encode(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Latents without sampling, unscaled; (n, 3, height, width) -> (n, channels, height / f, width / f)."""
    encoded = model.encode(x)
    latents: torch.Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents
