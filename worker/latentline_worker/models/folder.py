"""Checks a model folder in diffusers' format before it is loaded, so that an error names the file that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from latentline.errors import ModelError

from . import checksums

INDEX = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's ``model_index.json``: the pipeline's class and what it is made of.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    index = _json(folder / INDEX)
    if not isinstance(index, dict):
        raise ModelError(f"{folder / INDEX}: not a JSON object")
    return index


def check(folder: Path, parts: Iterable[str]) -> None:
    """Check every file that loading needs.

    Args:
        folder: the model's.
        parts: sub-folders with weights. Those that the index leaves out (null) are not looked for.

    Raises:
        ModelError: a file is missing, is not JSON, is not a whole safetensors file, or is not the one that the folder's sums tell of.
    """
    index = read_index(folder)
    _json(folder / "scheduler" / "scheduler_config.json")
    for part in parts:
        if part in index and not any(index[part] or ()):  # [null, null]: the model has none
            continue
        _json(folder / part / "config.json")
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            raise ModelError(f"{folder / part}: no .safetensors file (other weight formats are not loaded)")
        for path in weights:
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a whole safetensors file: {error}") from None
    checksums.check(folder)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing from the model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
