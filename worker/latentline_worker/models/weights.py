"""How many bytes the weights of a model take: counted from its files before it is loaded, and of its modules afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from latentline.errors import ModelError

from . import bundled_model, layouts, sources
from .base import Family
from .catalog import ModelEntry

NAMES = ("diffusion_pytorch_model", "model")  # of weight files, as diffusers and transformers look for them
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no family loads


def of_files(entry: ModelEntry, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from the heads of its files; nothing of their content is read.

    Args:
        entry: where the files are.
        dtype: in which the weights would be loaded.

    Raises:
        ModelError: a file is missing or cut off; the message names it.
    """
    return dtype.itemsize * sum(math.prod(shape) for shapes in _shapes(entry) for shape in shapes)


def _shapes(entry: ModelEntry) -> list[list[tuple[int, ...]]]:
    if entry.source == bundled_model.MODEL_ID:
        paths = [*sorted(bundled_model.FOLDER.rglob("*.safetensors")), bundled_model.minilm_folder() / "model.safetensors"]
        return [list(layouts.tensor_shapes(path).values()) for path in paths]
    files = sources.find(entry.location, entry.config)
    parts = [name for name, value in files.index.items() if isinstance(value, list) and any(value) and name not in UNUSED]
    found = [list(files.checkpoint.shapes.values())] if files.checkpoint else []
    for part in files.outside(tuple(parts)):
        found += [list(layouts.tensor_shapes(path).values()) for path in _files(files.folder / part)]
    return found


def _files(folder: Path) -> list[Path]:
    """The weight files of a part: one, or those of its index; none for a part without weights, such as a tokenizer."""
    for name in NAMES:
        if (whole := folder / f"{name}.safetensors").is_file():
            return [whole]
        listing = folder / f"{name}.safetensors.index.json"
        if listing.is_file():
            try:
                return [folder / file for file in sorted(set(json.loads(listing.read_text())["weight_map"].values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{listing}: not readable as an index of weights: {error}") from None
    return []


def of_family(family: Family) -> int:
    """Bytes of the weights of a loaded model, on whatever device they are. What two parts share counts once."""
    modules = [value for value in vars(family).values() if isinstance(value, torch.nn.Module)]
    for value in vars(family).values():  # a family may keep its pipeline
        parts = getattr(value, "components", None)
        modules += [part for part in parts.values() if isinstance(part, torch.nn.Module)] if isinstance(parts, dict) else []
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
