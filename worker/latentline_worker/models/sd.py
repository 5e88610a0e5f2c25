"""Stable Diffusion 1.x and 2.x: VAE, U-Net with cross-attention, a CLIP-style or BERT-style text encoder.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752).
Loads any diffusers-format directory or hub id of that shape, safetensors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel

from latentline.errors import ModelError
from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable, is_flow, names_for, sampler_table

from . import checksums
from .base import Encoded, Row, Text
from .lora import Adapters, Target
from .parts import decoded, decoder_dtype, first_noise, guidance_embedding, load_pipeline, place
from .sources import ModelFiles
from .transfer import to_device

PARTS = ("vae", "unet", "text_encoder")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")


def is_distilled(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a model takes few Euler steps and has its guidance within: ``latentline train distill`` writes such a configuration."""
    return is_flow(scheduler_config) and scheduler_config.get("solver_order") == 1


class StableDiffusion:
    """The :class:`~latentline_worker.models.base.Family` of SD 1.x and 2.x."""

    def __init__(
        self,
        model_id: str,
        *,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        scheduler_config: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        prediction = scheduler_config.get("prediction_type", "epsilon")
        if prediction not in PREDICTION_TYPES:
            raise ModelError(f"{model_id}: prediction_type is {prediction!r}; allowed: {', '.join(PREDICTION_TYPES)}")
        self.revision = checksums.of_modules((vae, unet, text_encoder))
        place(text_encoder, device, dtype)
        place(unet, device, dtype, convolutions=True)
        place(vae, device, decoder_dtype(vae, dtype), convolutions=True)
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.adapters: Adapters | None = None
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config
        self.device, self.dtype = device, dtype
        self._guidance_is_input = unet.config.time_cond_proj_dim is not None  # a latent consistency model
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent along a side
        if self._guidance_is_input:
            steps, guidance_scale, scheduler = 4, 8.0, "lcm"
        else:
            steps, guidance_scale, scheduler = (4, 0.0, "euler") if is_distilled(scheduler_config) else (20, 5.0, "dpmpp_2m")
        # The U-Net halves its input at each block except the last; SD's own pipelines require multiples of 8.
        side = max(MIN_SIZE_PX, unet.config.sample_size * self.vae_scale_factor)
        self.info = ModelInfo(
            id=model_id,
            family="sd",
            default_width=side,
            default_height=side,
            size_multiple=max(8, self.vae_scale_factor * 2 ** (len(unet.config.block_out_channels) - 1)),
            max_pixels=min(MAX_SIZE_PX**2, (2 * side) ** 2),
            schedulers=names_for(scheduler_config),
            default_num_inference_steps=steps,
            default_guidance_scale=guidance_scale,
            default_scheduler=scheduler,
            rows_unguided=1,
            # Classifier-free guidance: one with the prompt, one with the negative prompt.
            rows_guided=1 if self._guidance_is_input else 2,
            negative_prompts=not self._guidance_is_input,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        pipeline = load_pipeline(StableDiffusionPipeline, files, dtype, PARTS, **options)
        return cls(
            model_id,
            vae=pipeline.vae,
            unet=pipeline.unet,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            scheduler_config=dict(pipeline.scheduler.config),
            device=device,
            dtype=dtype,
        )

    def lora_target(self) -> Target:
        """What adapters change."""
        return Target(StableDiffusionPipeline, {"unet": self.unet, "text_encoder": self.text_encoder})

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return int(self.unet.config.in_channels), height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        return sampler_table(request.scheduler, self.scheduler_config, request.num_inference_steps)

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        prompt = Text(request.prompt)
        guided = request.guidance_scale > 1 and not self._guidance_is_input  # as in diffusers: it has an effect only above 1
        return (prompt, Text(request.negative_prompt, negative=True)) if guided else (prompt,)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        # The same computation as StableDiffusionPipeline.encode_prompt without LoRA and clip_skip.
        prompts = [text.prompt for text in texts]
        length = int(self.tokenizer.model_max_length)
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = to_device(tokens.attention_mask, self.device) if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        states: torch.Tensor = self.text_encoder(to_device(tokens.input_ids, self.device), attention_mask=mask)[0]
        counts = [len(ids) for ids in self.tokenizer(prompts, truncation=False, verbose=False).input_ids]
        return [Encoded({"prompt_embeds": one}, (count, length)) for one, count in zip(states.to(self.dtype), counts, strict=True)]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        if not self._guidance_is_input:
            return [one.row for one in encoded]
        size = int(self.unet.config.time_cond_proj_dim)
        embedded = guidance_embedding(request.guidance_scale, size, self.device, self.dtype)
        return [{**one.row, "timestep_cond": embedded} for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        out: torch.Tensor = self.unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=rows["prompt_embeds"],
            timestep_cond=rows.get("timestep_cond"),
            return_dict=False,
        )[0]
        return out

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
        return uncond + scale * (cond - uncond)

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return decoded(self.vae, z, tiled=tiled)
