"""Small models of two families of flow matching with random weights, for a CPU: speed does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextModelWithProjection, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from .real_shapes import text_encoder, tokenizer

WIDTH = 128  # of the transformers
TEXT_WIDTH = 64  # of the text encoders
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}{% endfor %}"


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        shift_factor=0.1,
    ).eval()


def sd3() -> StableDiffusion3Pipeline:
    """64 px: 256 tokens of the picture and 333 of the text; two guidance branches."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=64,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH, 2).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, TEXT_WIDTH, 2).eval(),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def z_image() -> ZImagePipeline:
    """64 px: 256 tokens of the picture and the text's."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=WIDTH // 32,
        n_kv_heads=WIDTH // 32,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 128, 128],
    )
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": 2, "head_dim": 16}
    encoder = Qwen3Model(Qwen3Config(vocab_size=300, num_attention_heads=4, num_key_value_heads=4, **sizes))
    vocab = {letter: number for number, letter in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=encoder.eval(),
        tokenizer=Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048, chat_template=CHAT),
        transformer=transformer.eval(),
    )
