"""Train the autoencoder: 64x64x3 pixels to 16x16x4 latents, 12 times fewer values.

Kingma and Welling 2013 (arXiv:1312.6114) as used by Rombach et al. 2022 (arXiv:2112.10752), with plain
reconstruction losses: L1 on pixels, on their differences (edges) and on a low-pass (colour).
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from .budget import Budget
from .data import BACKGROUNDS, compose, load_sprites

SIZE_PX = 64
BATCH = 32
KL_WEIGHT = 1e-6


def make_autoencoder() -> AutoencoderKL:
    """The bundled autoencoder with fresh weights: f=4, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> (n, 3, height, width) in -1..1."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1.0


def random_pictures(sprites: dict[str, Image.Image], count: int, rng: random.Random) -> torch.Tensor:
    """``count`` composed training pictures, (count, 3, 64, 64) in -1..1."""
    keys = rng.choices(list(sprites), k=count)
    return to_tensor([compose(sprites[key], rng.choice(list(BACKGROUNDS)), SIZE_PX, rng) for key in keys])


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on horizontal and vertical differences, and on 4x4 means."""
    edges = sum(F.l1_loss(output.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(output, target) + edges + F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))


def train(data: Path, work: Path, minutes: float, *, decoder_only: bool = False) -> None:
    """Train within a time budget, resumable; writes ``work/vae`` (diffusers format).

    With ``decoder_only`` the encoder stays as it is in ``work/vae``, so that a denoiser trained on its
    latents remains valid, and the decoder alone is refined.
    """
    sprites = load_sprites(data)
    vae = AutoencoderKL.from_pretrained(work / "vae") if decoder_only else make_autoencoder()
    trained = list(vae.decoder.parameters()) + list(vae.post_quant_conv.parameters()) if decoder_only else list(vae.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    budget = Budget(minutes, work / ("decoder.ckpt" if decoder_only else "vae.ckpt"))
    peak = 5e-4 if decoder_only else 1.5e-3
    for step in budget.steps({"vae": vae, "optimizer": optimizer}):
        rng = random.Random(step + (1 << 20) * decoder_only)
        x = random_pictures(sprites, BATCH, rng)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate(peak)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(x).latent_dist
            z = posterior.mode() if decoder_only else posterior.sample()
        output = vae.decode(z).sample
        loss = reconstruction_loss(output, x)
        if not decoder_only:
            loss = loss + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            psnr = 10 * torch.log10(4 / F.mse_loss(output.detach().clamp(-1, 1), x)).item()
            print(f"autoencoder step {step} progress {budget.progress:.3f} loss {loss.item():.4f} psnr {psnr:.2f} dB", flush=True)
    if not decoder_only:
        with torch.no_grad():
            z = vae.encode(random_pictures(sprites, 256, random.Random(1))).latent_dist.mode()
        vae.register_to_config(scaling_factor=round(1.0 / z.std().item(), 5))
    vae.save_pretrained(work / "vae")
