"""What several families do with the parts of a diffusers pipeline: load them, put them on the device, turn decodes into pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from latentline.errors import ModelError
from latentline.jobs import ResolvedRequest

from . import folder
from .base import Family
from .lora import Target
from .sources import ModelFiles
from .transfer import to_device

# What diffusers, transformers and torch raise of a model that they cannot make sense of.
_FAILURES = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, SafetensorError, SingleFileComponentError,
)  # fmt: skip


def load_pipeline(
    pipeline: Any, files: ModelFiles, dtype: torch.dtype, parts: tuple[str, ...], *, optional: Iterable[str] = (), **options: Any
) -> Any:
    """Load a model with a pipeline class, safetensors only, after all of its files were checked.

    Args:
        pipeline: the diffusers class.
        files: where they are.
        dtype: of the weights.
        parts: those of the pipeline that have weights.
        optional: those of them that a model may lack.
        options: for the pipeline's constructor.

    Raises:
        ModelError: the model is broken; the message names the file.
    """
    outside = files.outside(parts)
    folder.check(files.folder, parts, optional=optional, elsewhere=set(parts) - set(outside))
    # What the index leaves out has to be said again, or diffusers counts it as missing.
    options |= {name: None for name, entry in files.index.items() if isinstance(entry, list) and not any(entry)}
    try:
        if files.checkpoint is None:
            return pipeline.from_pretrained(files.folder, dtype=dtype, use_safetensors=True, **options)
        given = {part: _load_part(files, part, dtype) for part in outside if any(files.index.get(part) or ())}
        options |= {"config": str(files.folder), "local_files_only": True, **given}
        loaded = pipeline.from_single_file(str(files.checkpoint.path), dtype=dtype, **options)
    except _FAILURES as error:
        raise ModelError(f"{files}: cannot be loaded as a {pipeline.__name__}: {str(error).strip().splitlines()[0]}") from error
    _check_complete(files, loaded, parts)
    return loaded


def _load_part(files: ModelFiles, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A part that a single file lacks, from the folder of its configuration."""
    library, name = files.index[part]
    kind = getattr(diffusers if library == "diffusers" else transformers, name)
    module: torch.nn.Module = kind.from_pretrained(files.folder, subfolder=part, dtype=dtype, use_safetensors=True)
    return module


def _check_complete(files: ModelFiles, pipeline: Any, parts: Iterable[str]) -> None:
    """A tensor that a single file lacks stays without values, which diffusers does not mind."""
    for part in parts:
        module = getattr(pipeline, part)
        for name, tensor in module.state_dict().items() if module is not None else ():
            if tensor.is_meta:
                problem = f"the tensor {name} is missing: the file is incomplete, or {files.folder} is another model's"
                raise ModelError(f"{files}: {part}: {problem}")


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


def first_noise(family: Family, request: ResolvedRequest, generator: torch.Generator, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(c, h, w) standard normal noise that an image starts from, as diffusers' ``prepare_latents`` draws it for one generator an image.

    Args:
        dtype: in which the pipeline draws it, if it is not the network's.
    """
    assert request.width is not None and request.height is not None
    shape = family.latent_shape(request.width, request.height)
    return torch.randn((1, *shape), generator=generator, dtype=dtype or family.dtype)[0]


def lora_target(pipeline: Any, parts: Iterable[str]) -> Target:
    """What adapters change of a pipeline: those of these parts that it has."""
    return Target(type(pipeline), {name: getattr(pipeline, name) for name in parts if getattr(pipeline, name) is not None})


def decoded(vae: Any, z: torch.Tensor, *, tiled: bool) -> torch.Tensor:
    """The VAE's pictures of latents as it takes them, (n, height, width, 3) uint8; the first frame of each where it makes videos."""
    vae.use_tiling = tiled
    images = vae.decode(z, return_dict=False)[0]
    return to_pixels(images if images.ndim == 4 else images[:, :, 0])


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, height, width) in -1 to 1 -> (n, height, width, 3) uint8, as diffusers' ``VaeImageProcessor`` does it."""
    pixels: torch.Tensor = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def guidance_embedding(scale: float, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size,) the guidance scale as consistency models take it (Luo et al. 2023, arXiv:2310.04378)."""
    one = torch.tensor([scale - 1])
    embedded: torch.Tensor = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, one, size)[0].to(dtype)
    return to_device(embedded, device)
