"""FLUX.1 dev and schnell: a transformer over packed latents and T5 states, distilled so that one row an image suffices.

Black Forest Labs 2024; flow matching as in Esser et al. 2024 (arXiv:2403.03206). dev takes the guidance scale as an input,
schnell none. Loads any diffusers-format directory or hub id of a ``FluxPipeline``, safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline

from latentline.jobs import MAX_SIZE_PX, MIN_SIZE_PX, ModelInfo, ResolvedRequest
from latentline_worker.samplers import SamplerTable

from . import checksums
from .base import Encoded, Row, Text
from .flow import names_with_levels, table_with_levels, with_flow
from .lora import Adapters, Target
from .parts import decoded, decoder_dtype, first_noise, load_pipeline, lora_target, place
from .patches import PATCH, pack, unpack
from .sources import ModelFiles

PARTS = ("vae", "transformer", "text_encoder", "text_encoder_2")
T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256  # that the two were trained with


class Flux:
    """The :class:`~latentline_worker.models.base.Family` of FLUX.1.

    A row holds ``prompt_embeds`` (512 or 256, 4096) of T5, ``pooled`` (768,) of CLIP and, for dev, ``guidance`` (). Latents stay
    (c, h, w) in the engine, as noise is drawn; they are packed for the network only.
    """

    def __init__(self, model_id: str, pipeline: FluxPipeline, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        self.adapters: Adapters | None = None
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        self.revision = checksums.of_modules((self.vae, self.transformer, *encoders))
        for part in (*encoders, self.transformer):
            place(part, device, dtype)
        place(self.vae, device, decoder_dtype(self.vae, dtype), convolutions=True)
        self.scheduler_config = with_flow(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.vae_scale_factor = pipeline.vae_scale_factor
        self._guidance_is_input = bool(self.transformer.config.guidance_embeds)
        self._num_tokens = T5_TOKENS_DEV if self._guidance_is_input else T5_TOKENS_SCHNELL
        side = max(MIN_SIZE_PX, pipeline.default_sample_size * self.vae_scale_factor)
        self.info = ModelInfo(
            id=model_id,
            family="flux",
            default_width=side,
            default_height=side,
            size_multiple=max(8, PATCH * self.vae_scale_factor),
            max_pixels=MAX_SIZE_PX**2,
            schedulers=names_with_levels(self.scheduler_config),
            default_num_inference_steps=28 if self._guidance_is_input else 4,
            default_guidance_scale=3.5 if self._guidance_is_input else 0.0,
            default_scheduler="euler",
            rows_guided=1,
            negative_prompts=False,
        )

    @classmethod
    def load(cls, files: ModelFiles, model_id: str, device: torch.device, dtype: torch.dtype) -> Flux:
        """Load the model from its files.

        Raises:
            ModelError: the model is missing or broken; the message names the file.
        """
        return cls(model_id, load_pipeline(FluxPipeline, files, dtype, PARTS), device, dtype)

    def lora_target(self) -> Target:
        """What adapters change."""
        return lora_target(self._pipeline, PARTS[1:])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        channels = int(self.transformer.config.in_channels) // PATCH**2
        return channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def table(self, request: ResolvedRequest) -> SamplerTable:
        assert request.width is not None and request.height is not None
        _, rows, columns = self.latent_shape(request.width, request.height)
        return table_with_levels(request, self.scheduler_config, (rows // PATCH) * (columns // PATCH))

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        return (Text(request.prompt),)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        prompts = [text.prompt for text in texts]
        states, pooled, _ = self._pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self._num_tokens)
        counts = [len(ids) for ids in self._pipeline.tokenizer_2(prompts, truncation=False, verbose=False).input_ids]
        rows = zip(states.to(self.dtype), pooled.to(self.dtype), counts, strict=True)
        return [Encoded({"prompt_embeds": one, "pooled": two}, (count, self._num_tokens)) for one, two, count in rows]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        if not self._guidance_is_input:
            return [one.row for one in encoded]
        guidance = torch.full((), request.guidance_scale, dtype=torch.float32, device=self.device)
        return [{**one.row, "guidance": guidance} for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return first_noise(self, request, generator)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        height, width = latents.shape[-2:]
        out: torch.Tensor = self.transformer(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=timesteps.to(self.dtype) / 1000,  # diffusers casts before it divides: in bf16 the order tells
            guidance=rows.get("guidance"),
            pooled_projections=rows["pooled"],
            encoder_hidden_states=rows["prompt_embeds"],
            txt_ids=torch.zeros(rows["prompt_embeds"].shape[1], 3, dtype=self.dtype, device=latents.device),
            img_ids=self._image_ids(height // PATCH, width // PATCH, latents.device),
            return_dict=False,
        )[0]
        return unpack(out, latents.shape)

    def _image_ids(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """(tokens, 3): nothing, row and column of each token."""
        row = torch.arange(rows, dtype=self.dtype, device=device).view(-1, 1).expand(rows, columns)
        column = torch.arange(columns, dtype=self.dtype, device=device).view(1, -1).expand(rows, columns)
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return uncond + scale * (cond - uncond)  # no request has a second branch

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * self.vae_scale_factor**2)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return decoded(self.vae, z, tiled=tiled)
