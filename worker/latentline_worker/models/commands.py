"""What ``latentline models list``, ``check`` and ``add`` do with the file that names a worker's models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from latentline.errors import ConfigurationError, ModelError
from latentline.models import ModelInfo

from . import bundled_model, catalog, registry
from .catalog import ModelEntry

CPU = torch.device("cpu")
CHECKED_DTYPE = torch.bfloat16  # of models whose entry names none: half of the memory of float32


def describe(path: Path) -> Iterable[dict[str, Any]]:
    """Each model of a file, as JSON: its id and what its entry gives."""
    return [{"id": entry.name, **entry.model_dump(mode="json", exclude_none=True)} for entry in catalog.read(path).models]


def check(path: Path) -> Iterator[dict[str, Any]]:
    """Load the files of each model into host memory, one model after the other.

    Yields:
        of each model: its id, whether it is ``fine``, and what it is or what is wrong with it (``says``).

    Raises:
        ConfigurationError: the file itself cannot be read, or says something that has no meaning.
    """
    for entry in catalog.read(path).models:
        try:
            yield {"id": entry.name, "fine": True, "says": _summary(_load(entry))}
        except ModelError as error:
            yield {"id": entry.name, "fine": False, "says": error.message}


def add(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Append a model to a file once its own files were loaded; its id, and what it is (``says``).

    Args:
        path: is made if it does not exist.
        fields: as in an entry.

    Raises:
        ConfigurationError: a field has no meaning, or the file has such a model already.
        ModelError: the model cannot be loaded.
    """
    # A path of the command line starts from the current folder; the file has to name the same one wherever it is read.
    paths = {
        name: str(Path(fields[name]).resolve()) for name in ("source", "config", "lora_dir") if name in fields and _exists(fields[name])
    }
    try:
        entry = ModelEntry.model_validate({**fields, **paths})
    except ValidationError as error:
        raise ConfigurationError(catalog.problem(error, ("models",))) from None
    catalog.with_entry(path, entry)  # before its files are loaded: that may take minutes
    info = _load(entry)
    catalog.append(path, entry)
    return {"id": entry.name, "says": _summary(info)}


def _exists(text: str) -> bool:
    return text != bundled_model.MODEL_ID and Path(text).exists()


def _load(entry: ModelEntry) -> ModelInfo:
    dtype = CHECKED_DTYPE if entry.dtype in (None, "auto") else getattr(torch, str(entry.dtype))
    return registry.load_entry(entry, CPU, dtype).info


def _summary(info: ModelInfo) -> str:
    size = f"{info.default_width}x{info.default_height}"
    return (
        f"{info.family}, {size}, {info.first_scheduler}, {info.default_num_inference_steps} steps, guidance {info.default_guidance_scale:g}"
    )
