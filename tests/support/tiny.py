"""A tiny Stable Diffusion with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
WIDTH = 32  # of the text encoder


def clip_config(width: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=1000,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=width,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """A token for each letter."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in LETTERS:
        vocab[letter] = len(vocab)
        vocab[letter + "</w>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def small_vae(vae_scale_factor: int = 2, **options: Any) -> AutoencoderKL:
    """Four latent channels; its weights come from the global generator."""
    channels = (16, *[32] * (vae_scale_factor.bit_length() - 1))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16 * vae_scale_factor,
        **options,
    ).eval()


def tiny_pipeline(prediction_type: str = "epsilon", vae_scale_factor: int = 2) -> StableDiffusionPipeline:
    """SD's shape at a thousandth of its size, 16x16 latents, CLIP with a few words.

    Args:
        vae_scale_factor: pixels per latent along a side, a power of two: 2 makes 32 px, 4 makes 64 px.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = small_vae(vae_scale_factor)
    text_encoder = CLIPTextModel(clip_config()).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, clip_tokenizer(), unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
