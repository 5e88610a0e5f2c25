"""Stable Diffusion XL: two CLIP text encoders, their pooled text and the picture's size as further inputs of the U-Net.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv:2307.01952).
Loads any diffusers-format directory or hub id of a ``StableDiffusionXLPipeline``, safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable, names_for, sampler_table

from . import checksums
from .base import Encoded, Row, Text
from .lora import Adapters, Target
from .parts import decoded, decoder_dtype, first_noise, guidance_embedding, load_pipeline, lora_target, place
from .sources import ModelFiles
from .transfer import to_device

PARTS = ("vae", "unet", "text_encoder", "text_encoder_2")


class StableDiffusionXL:
    """The :class:`~latentline_worker.models.base.Family` of SDXL.

    A row holds ``prompt_embeds`` (77, 2048), ``pooled`` (1280,), ``time_ids`` (6,): original size, crop and target size, each
    (rows, columns) in pixels; and ``timestep_cond`` for a network that was distilled with its guidance as an input.
    """

    def __init__(self, model_id: str, pipeline: StableDiffusionXLPipeline, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.vae, self.unet = pipeline.vae, pipeline.unet
        self.adapters: Adapters | None = None
        encoders = [part for part in (pipeline.text_encoder, pipeline.text_encoder_2) if part is not None]
        self.revision = checksums.of_modules((self.vae, self.unet, *encoders))
        for encoder in encoders:
            place(encoder, device, dtype)
        place(self.unet, device, dtype, convolutions=True)
        place(self.vae, device, decoder_dtype(self.vae, dtype), convolutions=True)
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.vae_scale_factor = pipeline.vae_scale_factor
        self._guidance_is_input = self.unet.config.time_cond_proj_dim is not None
        side = max(MIN_SIZE_PX, self.unet.config.sample_size * self.vae_scale_factor)
        self.info = ModelInfo(
            id=model_id,
            family="sdxl",
            default_width=side,
            default_height=side,
            # The U-Net halves its input at each block except the last.
            size_multiple=max(8, self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)),
            max_pixels=min(MAX_SIZE_PX**2, (2 * side) ** 2),
            schedulers=names_for(self.scheduler_config),
            default_num_inference_steps=30,
            default_guidance_scale=5.0,
            default_scheduler="euler",
            rows_guided=1 if self._guidance_is_input else 2,
            negative_prompts=not self._guidance_is_input,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionXL:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        return cls(model_id, load_pipeline(StableDiffusionXLPipeline, files, dtype, PARTS, add_watermarker=False), device, dtype)

    def lora_target(self) -> Target:
        """What adapters change."""
        return lora_target(self._pipeline, PARTS[1:])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return int(self.unet.config.in_channels), height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        return sampler_table(request.scheduler, self.scheduler_config, request.num_inference_steps)

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        prompt = Text(request.prompt)
        guided = request.guidance_scale > 1 and not self._guidance_is_input
        return (prompt, Text(request.negative_prompt, negative=True)) if guided else (prompt,)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        prompts = [text.prompt for text in texts]
        states, _, pooled, _ = self._pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        tokenizer = self._pipeline.tokenizer_2
        counts = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
        length = int(tokenizer.model_max_length)
        rows = [{"prompt_embeds": one, "pooled": two} for one, two in zip(states.to(self.dtype), pooled.to(self.dtype), strict=True)]
        if self._pipeline.config.force_zeros_for_empty_prompt:
            # diffusers does this where no negative prompt is given; requests do not tell an empty one from none.
            rows = [_zeros(row) if text.negative and not text.prompt else row for text, row in zip(texts, rows, strict=True)]
        return [Encoded(row, (count, length)) for row, count in zip(rows, counts, strict=True)]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        rows, columns = request.height, request.width
        time_ids = torch.tensor([rows, columns, 0, 0, rows, columns], dtype=self.dtype)
        more = {"time_ids": to_device(time_ids, self.device)}
        if self._guidance_is_input:
            size = int(self.unet.config.time_cond_proj_dim)
            more["timestep_cond"] = guidance_embedding(request.guidance_scale, size, self.device, self.dtype)
        return [{**one.row, **more} for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        out: torch.Tensor = self.unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=rows["prompt_embeds"],
            timestep_cond=rows.get("timestep_cond"),
            added_cond_kwargs={"text_embeds": rows["pooled"], "time_ids": rows["time_ids"]},
            return_dict=False,
        )[0]
        return out

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return uncond + scale * (cond - uncond)

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        config, z = self.vae.config, latents.to(self.vae.dtype)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (z.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            z = z * std / config.scaling_factor + mean
        else:
            z = z / config.scaling_factor
        return decoded(self.vae, z, tiled=tiled)


def _zeros(row: Row) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in row.items()}
