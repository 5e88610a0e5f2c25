"""Checks a model folder in diffusers' format before it is loaded, so that an error names the file that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from latentline.errors import ModelError

from . import checksums, layouts

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")  # whose classes a part may be of, beside diffusers' own pipelines
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")  # one of these, in a tokenizer's folder


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's ``model_index.json``: the pipeline's class and what it is made of.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    index = _json(folder / INDEX)
    if not isinstance(index, dict):
        raise ModelError(f"{folder / INDEX}: not a JSON object")
    return index


def check(folder: Path, parts: Iterable[str], *, optional: Iterable[str] = (), elsewhere: Iterable[str] = ()) -> None:
    """Check every file that loading needs.

    Args:
        folder: the model's.
        parts: sub-folders with weights.
        optional: those of them that the index may leave out (null).
        elsewhere: those of them whose weights are not taken from here.

    Raises:
        ModelError: a file is missing, is not JSON, is not a whole safetensors file, or is not the one that the folder's sums tell
            of; a part is absent, or of a class that the folder would bring itself.
    """
    index = read_index(folder)
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list):
            _check_class(folder, name, entry)
    _json(folder / "scheduler" / "scheduler_config.json")
    for part in parts:
        if not any(index.get(part) or ()):  # absent, or [null, null]
            if part in optional:
                continue
            raise ModelError(f"{folder / INDEX}: {part}: got {index.get(part)!r}; allowed: its library and class, as this model needs it")
        _json(folder / part / "config.json")
        if part not in elsewhere:
            _check_weights(folder / part)
    for name, entry in index.items():
        if name.startswith("tokenizer") and any(entry or ()) and not any((folder / name / file).is_file() for file in VOCABULARIES):
            raise ModelError(f"{folder / name}: no vocabulary; allowed: one of {', '.join(VOCABULARIES)}")
    checksums.check(folder)


def _check_class(folder: Path, name: str, entry: list[Any]) -> None:
    library = entry[0] if entry else None
    if library is not None and library not in LIBRARIES and not hasattr(diffusers.pipelines, str(library)):
        raise ModelError(
            f"{folder / INDEX}: {name}: got {entry!r}; allowed: classes of {' and '.join(LIBRARIES)}: "
            "code that comes with a model is not run"
        )


def _check_weights(folder: Path) -> None:
    """Every safetensors file is whole, and all parts of a split one are there."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder}: no .safetensors file (other weight formats, such as pickles, are not loaded)")
    for listing in sorted(folder.glob("*.safetensors.index.json")):
        found = _json(listing)
        files = found.get("weight_map") if isinstance(found, Mapping) else None
        if not isinstance(files, Mapping):
            raise ModelError(f"{listing}: no weight_map")
        for name in sorted({str(file) for file in files.values()}):
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name}: missing from the model")
    for path in weights:
        layouts.tensor_shapes(path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing from the model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
