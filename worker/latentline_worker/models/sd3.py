"""Stable Diffusion 3 and 3.5: a transformer over latent patches and text together, trained with flow matching.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv:2403.03206).
Loads any diffusers-format directory or hub id of a ``StableDiffusion3Pipeline``, safetensors only; T5 may be left out of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline

from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable, names_for, sampler_table

from . import checksums
from .base import Encoded, Row, Text
from .flow import mu_of, with_flow
from .lora import Adapters, Target
from .parts import decoded, decoder_dtype, first_noise, load_pipeline, lora_target, place
from .sources import ModelFiles

PARTS = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
T5_TOKENS = 256  # that the model was trained with; diffusers' default


class StableDiffusion3:
    """The :class:`~latentline_worker.models.base.Family` of SD3 and SD3.5.

    A row holds ``prompt_embeds`` (77 + 256, 4096), CLIP's states and then T5's, and ``pooled`` (2048,).
    """

    def __init__(self, model_id: str, pipeline: StableDiffusion3Pipeline, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        self.adapters: Adapters | None = None
        encoders = [getattr(pipeline, name) for name in PARTS[2:] if getattr(pipeline, name) is not None]
        self.revision = checksums.of_modules((self.vae, self.transformer, *encoders))
        for part in (*encoders, self.transformer):
            place(part, device, dtype)
        place(self.vae, device, decoder_dtype(self.vae, dtype), convolutions=True)
        self.scheduler_config = with_flow(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.vae_scale_factor = pipeline.vae_scale_factor
        self._patch_size = int(self.transformer.config.patch_size)
        side = max(MIN_SIZE_PX, self.transformer.config.sample_size * self.vae_scale_factor)
        self.info = ModelInfo(
            id=model_id,
            family="sd3",
            default_width=side,
            default_height=side,
            size_multiple=max(8, self.vae_scale_factor * self._patch_size),
            # Positions are embedded up to this many patches along a side.
            max_pixels=min(MAX_SIZE_PX, self.transformer.config.pos_embed_max_size * self._patch_size * self.vae_scale_factor) ** 2,
            schedulers=names_for(self.scheduler_config),
            default_num_inference_steps=28,
            default_guidance_scale=7.0,
            default_scheduler="euler",
            rows_guided=2,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion3:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        return cls(model_id, load_pipeline(StableDiffusion3Pipeline, files, dtype, PARTS, optional=("text_encoder_3",)), device, dtype)

    def lora_target(self) -> Target:
        """What adapters change."""
        return lora_target(self._pipeline, PARTS[1:])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return int(self.transformer.config.in_channels), height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        assert request.width is not None and request.height is not None
        _, rows, columns = self.latent_shape(request.width, request.height)
        mu = mu_of(self.scheduler_config, (rows // self._patch_size) * (columns // self._patch_size), max_shift=1.16)
        return sampler_table(request.scheduler, self.scheduler_config, request.num_inference_steps, mu=mu)

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        prompt = Text(request.prompt)
        return (prompt, Text(request.negative_prompt, negative=True)) if request.guidance_scale > 1 else (prompt,)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        prompts = [text.prompt for text in texts]
        states, _, pooled, _ = self._pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        t5 = self._pipeline.text_encoder_3 is not None
        tokenizer = self._pipeline.tokenizer_3 if t5 else self._pipeline.tokenizer
        length = T5_TOKENS if t5 else int(tokenizer.model_max_length)
        counts = [len(ids) for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids]
        rows = zip(states.to(self.dtype), pooled.to(self.dtype), counts, strict=True)
        return [Encoded({"prompt_embeds": one, "pooled": two}, (count, length)) for one, two, count in rows]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        return [one.row for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        out: torch.Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=rows["prompt_embeds"],
            pooled_projections=rows["pooled"],
            return_dict=False,
        )[0]
        return out

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return uncond + scale * (cond - uncond)

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return decoded(self.vae, z, tiled=tiled)
