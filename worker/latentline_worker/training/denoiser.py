"""Train the denoiser: a cross-attention U-Net on the autoencoder's latents, steered by frozen MiniLM states.

v-prediction (Salimans and Ho 2022, arXiv:2202.00512) on the DDPM linear schedule (Ho et al. 2020,
arXiv:2006.11239), whose last step keeps next to no signal: plain backgrounds then take any colour.
Classifier-free guidance comes from dropping 10% of the captions (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from .autoencoder import SIZE_PX, to_tensor
from .budget import Budget
from .data import BACKGROUNDS, STYLES, captions, compose, load_concepts, load_sprites
from .text import encode_texts, load_minilm

BATCH = 32
CAPTION_DROP = 0.1
JITTERS = 3  # composed pictures per concept, style and background
# Half of the samples carry the default style and background, for which short prompts ask.
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}


def make_denoiser() -> UNet2DConditionModel:
    """The bundled U-Net with fresh weights: 16x16x4 latents, 384-d text states."""
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=32,
        norm_num_groups=16,
    )


class LatentSet:
    """All training latents and caption states in memory (about 400 MB), made once and kept in ``work``."""

    def __init__(self, data: Path, work: Path) -> None:
        path = work / "latents.pt"
        if not path.exists():
            torch.save(_prepare(data, work), path)
        kept = torch.load(path, weights_only=True)
        self.latents: torch.Tensor = kept["latents"]  # (concept, style, background, jitter, 4, 16, 16) half
        self.states: torch.Tensor = kept["states"]  # (caption, 32, 384) half; caption 0 is the empty one
        self.index: list[list[list[list[int]]]] = kept["index"]  # concept, style, background -> captions

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """(BATCH, 4, 16, 16) scaled latents and (BATCH, 32, 384) text states."""
        rows, texts = [], []
        for _ in range(BATCH):
            c = rng.randrange(len(self.index))
            s = 0 if rng.random() < 0.6 else rng.randrange(len(STYLES))
            b = 0 if rng.random() < 0.35 else rng.randrange(len(BACKGROUNDS))
            rows.append(self.latents[c, s, b, rng.randrange(JITTERS)])
            texts.append(0 if rng.random() < CAPTION_DROP else rng.choice(self.index[c][s][b]))
        return torch.stack(rows).float(), self.states[texts].float()


def _prepare(data: Path, work: Path) -> dict[str, object]:
    sprites, concepts = load_sprites(data), load_concepts()
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    rng = random.Random(0)
    texts: dict[str, int] = {"": 0}
    latents, index = [], []
    for concept in concepts:
        pictures, per_style = [], []
        for style in STYLES:
            per_background = []
            for background in BACKGROUNDS:
                pictures += [compose(sprites[f"{concept.slug}/{style}"], background, SIZE_PX, rng) for _ in range(JITTERS)]
                per_background.append([texts.setdefault(t, len(texts)) for t in captions(concept, style, background)])
            per_style.append(per_background)
        index.append(per_style)
        with torch.no_grad():
            z = vae.encode(to_tensor(pictures)).latent_dist.mode() * vae.config.scaling_factor
        latents.append(z.half().view(len(STYLES), len(BACKGROUNDS), JITTERS, *z.shape[1:]))
    tokenizer, encoder = load_minilm()
    states = torch.cat([encode_texts(tokenizer, encoder, list(texts)[i : i + 64]).half() for i in range(0, len(texts), 64)])
    return {"latents": torch.stack(latents), "states": states, "index": index}


def train(data: Path, work: Path, minutes: float) -> None:
    """Train within a time budget, resumable; writes ``work/unet`` (diffusers format, averaged weights)."""
    latent_set = LatentSet(data, work)
    print(f"{tuple(latent_set.latents.shape)} latents, {len(latent_set.states)} captions", flush=True)
    unet = make_denoiser()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(unet.parameters(), decay=0.998, update_after_step=200)
    noise_schedule = DDPMScheduler(**SCHEDULE)
    budget = Budget(minutes, work / "unet.ckpt")
    running = 0.0
    for step in budget.steps({"unet": unet, "optimizer": optimizer, "ema": ema}):
        rng = random.Random(step)
        x0, text = latent_set.batch(rng)
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),))
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate(8e-4, warmup_steps=200)
        v = unet(noise_schedule.add_noise(x0, noise, t), t, text).sample
        loss = F.mse_loss(v, noise_schedule.get_velocity(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 50 == 0:
            print(f"denoiser step {step} progress {budget.progress:.3f} loss {running:.4f}", flush=True)
    ema.copy_to(unet.parameters())
    unet.save_pretrained(work / "unet")
