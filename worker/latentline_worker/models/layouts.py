"""Checkpoints in one file, in the layout of the models' authors: whose layout it is, and which parts are in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import SafetensorError, safe_open

from latentline.errors import ModelError

_VAE = ("first_stage_model.", "vae.")
_UNET = ("model.diffusion_model.",)
_SDXL_TEXT = {"text_encoder": ("conditioner.embedders.0.transformer.",), "text_encoder_2": ("conditioner.embedders.1.",)}
_CLIP_L, _CLIP_G, _T5 = ("text_encoders.clip_l.",), ("text_encoders.clip_g.",), ("text_encoders.t5xxl.",)
_SD3 = ("model.diffusion_model.joint_blocks.", "joint_blocks.")
_FLUX = ("model.diffusion_model.double_blocks.", "double_blocks.")


@dataclass(frozen=True)
class Layout:
    """What the names of the tensors of one family begin with."""

    title: str
    pipelines: tuple[str, ...]
    """The diffusers classes that run such a model."""
    marks: tuple[str, ...]
    """A file is of this layout if the name of one of its tensors begins with one of these; the first layout that fits counts."""
    parts: Mapping[str, tuple[str, ...]]
    """A part of the pipeline -> what the names of its tensors begin with."""


LAYOUTS = (
    Layout("SD3", ("StableDiffusion3Pipeline",), _SD3, {
        "transformer": _SD3, "vae": _VAE, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5,
    }),
    Layout("FLUX.1", ("FluxPipeline",), _FLUX, {
        "transformer": _FLUX, "vae": _VAE, "text_encoder": _CLIP_L, "text_encoder_2": _T5,
    }),
    Layout("SDXL", ("StableDiffusionXLPipeline",), ("model.diffusion_model.label_emb.",), {"unet": _UNET, "vae": _VAE, **_SDXL_TEXT}),
    Layout("Stable Diffusion 1.x and 2.x", ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
           ("model.diffusion_model.input_blocks.",), {"unet": _UNET, "vae": _VAE, "text_encoder": ("cond_stage_model.",)}),
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A single file whose layout is known; no weight of it has been read yet."""

    path: Path
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]

    def parts(self) -> set[str]:
        """The parts of the pipeline of which it has weights."""
        return {part for part, starts in self.layout.parts.items() if any(name.startswith(starts) for name in self.shapes)}

    def usual_config(self) -> str:
        """The hub id of the published model whose configuration diffusers takes for such a file."""
        meta = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return str(fetch_diffusers_config(meta)["pretrained_model_name_or_path"])


def read(path: Path) -> Checkpoint:
    """The layout of a single file.

    Raises:
        ModelError: it is not a whole safetensors file, or of no layout that is known.
    """
    shapes = tensor_shapes(path)
    for layout in LAYOUTS:
        if any(name.startswith(layout.marks) for name in shapes):
            return Checkpoint(path, layout, shapes)
    known = ", ".join(layout.title for layout in LAYOUTS)
    raise ModelError(f"source: got {str(path)!r}, whose tensors are named {_some(shapes)}; allowed: the authors' layout of {known}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file.

    Raises:
        ModelError: it is missing, not a safetensors file, or cut off.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def _some(names: Iterable[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + ", ..." if first else "by nothing: it has none"
