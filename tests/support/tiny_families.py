"""A tiny pipeline of each family, with random weights and real text encoder classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .tiny import LETTERS, WIDTH, clip_config, clip_tokenizer, small_vae, tiny_pipeline


def _clip(kind: Any, *, seed: int, width: int = WIDTH) -> Any:
    torch.manual_seed(seed)
    return kind(clip_config(width)).eval()


def _t5() -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(vocab_size=200, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _vae(**options: Any) -> AutoencoderKL:
    torch.manual_seed(4)
    return small_vae(**options)


def sdxl(second_width: int = WIDTH) -> StableDiffusionXLPipeline:
    """32 px, two CLIPs, pooled text and time ids.

    Args:
        second_width: of the second text encoder. In a single file diffusers tells the two apart by their widths.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH + second_width,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + second_width,
    ).eval()
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return StableDiffusionXLPipeline(
        _vae(), _clip(CLIPTextModel, seed=1), _clip(CLIPTextModelWithProjection, seed=2, width=second_width),
        clip_tokenizer(), clip_tokenizer(), unet,
        scheduler, add_watermarker=False,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    """32 px, two CLIPs and T5; a static shift."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=32,
    ).eval()
    t5 = T5Config(vocab_size=200, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    torch.manual_seed(3)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModelWithProjection, seed=1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, seed=2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=_t5_tokenizer(),
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """Up to 256 px, CLIP's pooled text and T5's states; the shift depends on the size for dev, as in the published models."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds, shift=3.0 if guidance_embeds else 1.0),
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModel, seed=1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


def _qwen_tokenizer(**options: Any) -> Qwen2Tokenizer:
    """A token for each byte, and the marks of the chat template."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: number for number, letter in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(letters)])}
    marks = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048, **marks, **options)


def z_image() -> ZImagePipeline:
    """Up to 512 px, Qwen3's states; a static shift."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 128, 128],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # zeros would hide an error in padding
        torch.nn.init.normal_(token)
    torch.manual_seed(1)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=300, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8,
        )
    ).eval()  # fmt: skip
    chat = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=_qwen_tokenizer(chat_template=chat),
        transformer=transformer,
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen2.5-VL's states; the shift depends on the size and ends at a set level, as in the published model."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    torch.manual_seed(1)
    text = {
        "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    torch.manual_seed(4)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.2, 0.4, -0.1],
        latents_std=[2.8, 1.4, 2.3, 1.2],
    ).eval()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=_qwen_tokenizer(),
        transformer=transformer,
    )


def sd_flow() -> Any:
    """Stable Diffusion's shape, trained with flow matching, as a stock pipeline runs it."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=2.0,
        steps_offset=1,  # a stock pipeline warns of others; flow matching does not use it
    )
    return pipeline


def unpacked(pipeline: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(n, c, h, w) latents of what a pipeline gives with ``output_type="latent"``."""
    if not hasattr(pipeline, "_unpack_latents"):
        return latents
    found: torch.Tensor = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    return found if found.ndim == 4 else found[:, :, 0]  # Qwen-Image's are of a video of one frame


TINY: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "z-image": z_image,
    "qwen-image": qwen_image,
    "sd-flow": sd_flow,
}
"""By name; what each gives is built anew, always with the same weights."""
