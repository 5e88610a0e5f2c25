"""What several families do with the parts of a diffusers pipeline: load them, put them on the device, turn decodes into pixels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError

from latentline.errors import ModelError

from . import folder


def load_pipeline(pipeline: Any, source: str, dtype: torch.dtype, parts: Iterable[str], **options: Any) -> Any:
    """Load a diffusers-format folder or a hub id with a pipeline class, safetensors only.

    Args:
        pipeline: the diffusers class.
        source: the folder or hub id.
        dtype: of the weights.
        parts: sub-folders that hold weights.
        options: for ``from_pretrained``.

    Raises:
        ModelError: the model is missing or broken; the message names the file.
    """
    if Path(source).is_dir():
        folder.check(Path(source), parts)
    try:
        return pipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{source}: cannot be loaded as a {pipeline.__name__}: {str(error).splitlines()[0]}") from error


def place(module: Any, device: torch.device, dtype: torch.dtype, *, convolutions: bool = False) -> None:
    """Make a module ready for inference.

    Args:
        convolutions: it is made of them: on CUDA it gets the layout of tensor-core convolutions. On a CPU that measured no faster.
    """
    module.to(device).eval().requires_grad_(False)
    if module.dtype != dtype:
        module.to(dtype)
    if convolutions and device.type == "cuda":
        module.to(memory_format=torch.channels_last)


def decoder_dtype(vae: Any, dtype: torch.dtype) -> torch.dtype:
    """The type in which a VAE decodes: some overflow in fp16 and say so in their configuration."""
    return torch.float32 if dtype == torch.float16 and vae.config.get("force_upcast") else dtype


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, height, width) in -1 to 1 -> (n, height, width, 3) uint8, as diffusers' ``VaeImageProcessor`` does it."""
    pixels: torch.Tensor = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def guidance_embedding(scale: float, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size,) the guidance scale as consistency models take it (Luo et al. 2023, arXiv:2310.04378)."""
    one = torch.tensor([scale - 1])
    embedded: torch.Tensor = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, one, size)[0].to(dtype)
    return to_device(embedded, device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host without waiting for what the device has queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
