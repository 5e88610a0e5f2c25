"""SD 1.5 at 512 px and SDXL at 1024 px on a GPU: real shapes, random weights (the speed does not depend on the weights).

One call measures every GPU figure: images per second, the share of the device's matrix throughput, throughput against plain
pipelines, and the time outside the forward. It needs a CUDA device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from latentline.jobs import ModelInfo, ResolvedRequest
from latentline_worker.engine.engine import Engine
from latentline_worker.models.base import Encoded, Row, Text
from latentline_worker.samplers import SamplerTable, sampler_table

from .runners import to_work
from .trace import Job

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# Multiply-adds counted as two, attention included: TFLOP of one network row.
TFLOP_PER_ROW = {"sd15": 0.80, "sdxl": 6.76}
SHAPES = {"sd15": (512, 50), "sdxl": (1024, 30)}  # side in pixels, steps
TEXT = {"sd15": (77, 768), "sdxl": (77, 2048)}  # tokens, width of the prompt embeds


class RandomModel:
    """A U-Net and VAE of real size with random weights and random prompt embeds: enough to measure speed."""

    def __init__(self, name: str) -> None:
        self.device, self.dtype = torch.device("cuda"), torch.bfloat16
        self.scheduler_config = dict(DDIMScheduler(**SCHEDULE, clip_sample=False).config)
        self.name, self.revision = name, "random"
        side, _ = SHAPES[name]
        self.info = ModelInfo(id=name, family="sd", default_width=side, default_height=side, max_pixels=side * side)
        self.unet = _unet(name).to(self.device, self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=side,
        )
        self.vae = vae.to(self.device, self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 4, height // 8, width // 8

    def num_pixels(self, latents: torch.Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1] * 64)

    def table(self, request: ResolvedRequest) -> SamplerTable:
        return sampler_table(request.scheduler, self.scheduler_config, request.num_inference_steps)

    def texts(self, request: ResolvedRequest) -> tuple[Text, ...]:
        return (Text(request.prompt), Text("", negative=True)) if request.guidance_scale > 1 else (Text(request.prompt),)

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        embeds = torch.randn(len(texts), *TEXT[self.name], device=self.device, dtype=self.dtype)
        return [Encoded({"prompt_embeds": one}, (1, 77)) for one in embeds]

    def rows(self, request: ResolvedRequest, encoded: Sequence[Encoded]) -> list[Row]:
        return [one.row for one in encoded]

    def start(self, request: ResolvedRequest, index: int, generator: torch.Generator) -> torch.Tensor:
        side, _ = SHAPES[self.name]
        return torch.randn(self.latent_shape(side, side), generator=generator)

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return uncond + scale * (cond - uncond)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        more, prompt_embeds = {}, rows["prompt_embeds"]
        if self.name == "sdxl":  # pooled text and the six size numbers
            more["added_cond_kwargs"] = {
                "text_embeds": prompt_embeds[:, 0, :1280],
                "time_ids": torch.full((len(latents), 6), 1024.0, device=self.device, dtype=self.dtype),
            }
        x = latents.to(self.dtype, memory_format=torch.channels_last)
        out: torch.Tensor = self.unet(x, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False, **more)[0]
        return out

    def decode(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        self.vae.use_tiling = tiled
        image = self.vae.decode(latents.to(self.dtype), return_dict=False)[0]
        return ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def _unet(name: str) -> UNet2DConditionModel:
    if name == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # diffusers' defaults are SD 1.x otherwise
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def matrix_ceiling() -> float:
    """TFLOP/s of a large bf16 matrix product on this device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12


def one_by_one(model: RandomModel, images: int, steps: int) -> float:
    """Images a second the way a pipeline runs them: one guided job at a time, scheduler stepped on the host, then decoded."""
    side, _ = SHAPES[model.name]
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    rows = {"prompt_embeds": torch.stack([one.row["prompt_embeds"] for one in model.encode([Text("a cat"), Text("")])])}
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(images):
            scheduler.set_timesteps(steps, device="cuda")
            x = torch.randn(1, *model.latent_shape(side, side), device="cuda")
            for t in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([x, x]), t)
                m = model.denoise(both, t.expand(2), rows).float()
                m_cond, m_uncond = m.chunk(2)
                x = scheduler.step(m_uncond + 5.0 * (m_cond - m_uncond), t, x).prev_sample
            model.decode(x, tiled=False).cpu()
    torch.cuda.synchronize()
    return images / (time.perf_counter() - started)


def together(model: RandomModel, images: int, steps: int) -> tuple[float, Engine]:
    """Images a second through the engine, decoded, and the engine with its clock."""
    side, _ = SHAPES[model.name]
    engine = Engine([model])
    engine.warm_up()
    engine.clock.step_s = engine.clock.forward_s = 0.0
    started = time.perf_counter()
    requests = [engine.submit(replace(to_work(model, Job("a cat", "ddim", steps, 5.0, i), side), decode=True)) for i in range(images)]
    while not engine.idle:
        engine.step()
    for request in requests:
        request.result()
    return images / (time.perf_counter() - started), engine


def measure() -> dict[str, Any]:
    """Every figure of this module."""
    ceiling = matrix_ceiling()
    figures: dict[str, Any] = {"machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "matrix_ceiling_tflops": ceiling}
    for name, (_, steps) in SHAPES.items():
        model = RandomModel(name)
        one_by_one(model, 1, 3)  # warm-up
        alone = one_by_one(model, 4, steps)
        ours, engine = together(model, 64 if name == "sd15" else 24, steps)
        figures[name] = {
            "steps": steps,
            "images_per_s": ours,
            "throughput_vs_one_by_one": ours / alone,
            "share_of_ceiling": ours * steps * 2 * TFLOP_PER_ROW[name] / ceiling,
            "outside_forward_share": 1 - engine.clock.forward_s / engine.clock.step_s,
            "row_budget": engine.planner.cost.budget(next(iter(engine.lanes))),
        }
        del model, engine
        torch.cuda.empty_cache()
    return figures
