"""``python -m benchmarks.real_shapes``: SD 1.5 at 512 px and SDXL at 1024 px on a GPU, with random weights.

The shipped families and the shipped engine, wall time between steps included; speed does not depend on the weights. Each part measures one
model in one variant, ends within eight minutes, and appends a line of JSON to the file as soon as it has it, so that a run that is cut
short keeps what it has. ``--tiny`` runs the same code with tiny models, also on a CPU, to see that it works: its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentline_worker.engine.engine import Engine
from latentline_worker.models.base import Family
from latentline_worker.models.sd import StableDiffusion
from latentline_worker.models.sdxl import StableDiffusionXL
from latentline_worker.samplers import make_scheduler

from .runners import to_work
from .trace import Job

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
# Multiply-adds counted as two, attention included: TFLOP of one network row.
TFLOP_PER_ROW = {"sd15": 0.80, "sdxl": 6.76}
STEPS = {"sd15": 50, "sdxl": 30}
IMAGES = {"sd15": 64, "sdxl": 24}  # in one run
ALONE = 4  # images one by one
VARIANTS = (
    "eager", "graphs", "graphs, regional compile", "graphs, cuDNN attention first", "graphs, cudnn.benchmark", "graphs, compiled decode",
)  # fmt: skip


def tokenizer() -> CLIPTokenizer:
    """Letters as words: what the text says does not matter here."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter], vocab[letter + "</w>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def text_encoder(kind: Any, width: int, layers: int) -> Any:
    heads = max(1, width // 64)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return kind(CLIPTextConfig(projection_dim=width, vocab_size=1000, **sizes, **ends))


def autoencoder(tiny: bool) -> AutoencoderKL:
    channels = (16, 32) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=1 if tiny else 2,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=8 if tiny else 32,
    )


def sd15(device: torch.device, dtype: torch.dtype, tiny: bool) -> Family:
    """Stable Diffusion 1.5, which has the defaults of diffusers' U-Net but for the width of its text."""
    small = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    width = 64 if tiny else 768
    return StableDiffusion(
        "sd15",
        vae=autoencoder(tiny),
        unet=UNet2DConditionModel(cross_attention_dim=width, sample_size=16 if tiny else 64, **(small if tiny else {})),
        text_encoder=text_encoder(CLIPTextModel, width, 2 if tiny else 12),
        tokenizer=tokenizer(),
        scheduler_config=dict(DDIMScheduler(**SCHEDULE).config),
        device=device,
        dtype=dtype,
    )


def sdxl(device: torch.device, dtype: torch.dtype, tiny: bool) -> Family:
    one, two = (64, 64) if tiny else (768, 1280)
    unet = UNet2DConditionModel(
        sample_size=16 if tiny else 128,
        block_out_channels=(16, 32, 64) if tiny else (320, 640, 1280),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=8 if tiny else 32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2) if tiny else (1, 2, 10),
        attention_head_dim=(2, 4, 8) if tiny else (5, 10, 20),
        cross_attention_dim=one + two,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8 if tiny else 256,
        projection_class_embeddings_input_dim=6 * (8 if tiny else 256) + two,
    )
    pipeline = StableDiffusionXLPipeline(
        autoencoder(tiny),
        text_encoder(CLIPTextModel, one, 2 if tiny else 12),
        text_encoder(CLIPTextModelWithProjection, two, 2 if tiny else 32),
        tokenizer(),
        tokenizer(),
        unet,
        DDIMScheduler(**SCHEDULE),
        add_watermarker=False,
    )
    return StableDiffusionXL("sdxl", pipeline, device, dtype)


MODELS: dict[str, Callable[[torch.device, torch.dtype, bool], Family]] = {"sd15": sd15, "sdxl": sdxl}


@contextlib.contextmanager
def variant(name: str, family: Any) -> Iterator[None]:
    """The settings of a variant. A family is used for one variant only."""
    with contextlib.ExitStack() as stack:
        if "regional compile" in name:
            for module in family.unet.modules():
                if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
                    # dynamic: a static compile for each row count exceeds Dynamo's limit of eight without a word.
                    module.compile(dynamic=True)
        if "compiled decode" in name:  # on CUDA its convolutions are channels-last in every variant
            family.vae.decoder.compile(dynamic=True)
        if "cuDNN attention" in name:
            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(order, set_priority=True))
        kept = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = "cudnn.benchmark" in name
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = kept


def matrix_ceiling(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product on this device."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    _wait(device)
    return 20 * 2 * side**3 / (time.perf_counter() - started) / 1e12


def one_by_one(family: Family, images: int, steps: int) -> float:
    """Images a second the way a pipeline runs them: one guided job at a time, scheduler stepped on the host, then decoded."""
    side = family.info.default_width
    work = to_work(family, Job("a cat", "ddim", steps, 5.0, 0), side)
    started = time.perf_counter()
    with torch.inference_mode():
        cond, uncond = family.rows(work.request, family.encode(work.texts))
        rows = {name: torch.stack([uncond[name], cond[name]]) for name in cond}
        for _ in range(images):
            scheduler = make_scheduler("ddim", SCHEDULE)
            scheduler.set_timesteps(steps, device=family.device)
            x = torch.randn(1, *work.latent_shape, device=family.device)
            for t in scheduler.timesteps:
                m_uncond, m_cond = family.denoise(torch.cat([x, x]), t.expand(2), rows).float().chunk(2)
                x = scheduler.step(m_uncond + 5.0 * (m_cond - m_uncond), t, x).prev_sample
            family.decode(x, tiled=False).cpu()
    return images / (time.perf_counter() - started)


def together(family: Family, images: int, steps: int, graphs: bool) -> tuple[float, Engine]:
    """Images a second through the engine, decoded, and the engine with its clock."""
    engine = Engine([family], record=graphs)
    engine.warm_up()
    engine.clock.step_s = engine.clock.forward_s = 0.0
    side = family.info.default_width
    started = time.perf_counter()
    requests = [engine.submit(replace(to_work(family, Job("a cat", "ddim", steps, 5.0, i), side), decode=True)) for i in range(images)]
    while not engine.idle:
        engine.step()
    for request in requests:
        request.result()
    return images / (time.perf_counter() - started), engine


def measure(name: str, how: str, tiny: bool) -> dict[str, Any]:
    """One part: a model in a variant."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:  # random weights are made where they are needed: billions of them take minutes on the host
        family = MODELS[name](device, torch.bfloat16 if device.type == "cuda" else torch.float32, tiny)
    steps, images, few = (4, 4, 1) if tiny else (STEPS[name], IMAGES[name], ALONE)
    with variant(how, family):
        one_by_one(family, 1, 3)  # warm-up
        alone = one_by_one(family, few, steps)
        ours, engine = together(family, images, steps, graphs="graphs" in how)
    ceiling = matrix_ceiling(device)
    side = family.info.default_width
    latents = torch.randn(1, *family.latent_shape(side, side), device=device)
    decode_s = _seconds(lambda: family.decode(latents, tiled=False), device)
    return {
        "model": name,
        "variant": how,
        "tiny": tiny,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "steps": steps,
        "images_per_s": ours,
        "throughput_vs_one_by_one": ours / alone,
        "share_of_matrix_ceiling": None if tiny else ours * steps * 2 * TFLOP_PER_ROW[name] / ceiling,
        "matrix_ceiling_tflops": ceiling,
        "outside_forward_share": 1 - engine.clock.forward_s / engine.clock.step_s,
        "decode_s": decode_s,
        "row_budget": engine.planner.cost.budget(next(iter(engine.lanes))),
        "took_s": time.perf_counter() - started,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_shapes", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--out", type=Path, default=Path("real_shapes.jsonl"), help="a line for each part is added to this file")
    options = parser.parse_args(args)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("benchmarks.real_shapes: needs a GPU, and there is none (--tiny runs without one)")
    for name in options.model or MODELS:
        for how in options.variant or VARIANTS:
            figures = measure(name, how, options.tiny)
            line = json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()})
            print(line, flush=True)
            with options.out.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


if __name__ == "__main__":
    main()
