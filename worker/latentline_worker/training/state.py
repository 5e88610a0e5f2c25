"""A training's state on disk: saved atomically, refused when it belongs to another recipe, resumed from."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from .errors import TrainingError

NAME = "state.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Replace ``state.pt``: a kill at any moment leaves the older or the newer file, whole.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; the older state is still there.
    """
    scratch = folder / f"{NAME}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, folder / NAME)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise TrainingError(f"{folder / NAME}: the state cannot be saved ({error}); training stops at the older state") from error


def read(folder: Path) -> dict[str, Any] | None:
    """The saved state, or None where there is none.

    Raises:
        TrainingError: it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises what pickle and zipfile raise
        raise TrainingError(f"{path}: damaged ({error}); move it away to begin anew") from error
    return state


def load(folder: Path, recipe: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any] | None:
    """The saved state of this recipe and these inputs, or None where there is none.

    Raises:
        TrainingError: it is damaged, or a key of its recipe or an input differs; the message names file or key.
    """
    state = read(folder)
    if state is not None and (differing := _differing(state["recipe"], recipe)):
        raise TrainingError(f"{folder / NAME} belongs to another recipe: {', '.join(differing)} differ; use another folder")
    if state is not None and (differing := _differing(state.get("inputs", {}), inputs)):
        raise TrainingError(f"{folder / NAME} was made with other inputs: {', '.join(differing)} differ; use another folder")
    return state


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of values that differ; keys that only one side has came or went with a version."""
    found = []
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            found += _differing(old[name], new[name], f"{prefix}{name}.")
        elif old[name] != new[name]:
            found.append(f"{prefix}{name}")
    return sorted(found)
