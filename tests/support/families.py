"""A family of models that is nothing like Stable Diffusion, for what the engine must not take for granted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentline.jobs import ModelInfo, ResolvedRequest
from latentline_worker.models.base import Encoded, Row, Text
from latentline_worker.models.lora import Target
from latentline_worker.samplers import SamplerTable, sampler_table


class OddFamily:
    """Three channels, latents that are not square, rows of odd names, shapes and types, and a guidance of its own.

    Its network is a few sums and products: every part of a row changes the picture.
    """

    def __init__(self, model_id: str = "odd") -> None:
        self.info = ModelInfo(
            id=model_id,
            family="odd",
            default_width=64,
            default_height=64,
            size_multiple=8,
            max_pixels=128 * 128,
            default_guidance_scale=0.5,
            guided_above=0.0,
        )
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.revision = "odd 1"
        self.adapters = None

    def lora_target(self) -> Target:
        return Target(None, {})

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 3, height // 8, width // 4

    def table(self, request: ResolvedRequest) -> SamplerTable:
        return sampler_table(request.scheduler, {}, request.num_inference_steps)

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        texts = Text(request.prompt), Text(request.negative_prompt, negative=True)
        return texts if request.guidance_scale > 0 else texts[:1]

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: Text) -> Encoded:
        letters = torch.tensor([float(ord(letter) % 13) for letter in text.prompt[:5].ljust(5)])
        if text.negative and not text.prompt:
            letters = torch.zeros(5)
        row = {"a mask": letters > 5, "Z": letters.long(), "0.pooled": letters.mean() / 10}
        return Encoded(row, (len(text.prompt), 5))

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        size = torch.tensor([[float(request.width or 0)], [float(request.height or 0)]]) / 1000
        return [{**one.row, "size": size} for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self.latent_shape(request.width or 0, request.height or 0), generator=generator) + 0.01 * index

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        level = (rows["Z"].float() * rows["a mask"]).sum(1) / 50 + rows["0.pooled"] + rows["size"].sum((1, 2)) + timesteps / 1000
        return torch.sin(latents * 0.7) + level[:, None, None, None]

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return cond + scale * (cond - uncond) * 0.5

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * 32)

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        large = latents.repeat_interleave(8, 2).repeat_interleave(4, 3)
        return ((large / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
