"""SHA-256 sums of a model folder, so that damaged weights are found at start, and of weights in memory, which name a revision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from latentline.errors import ModelError

NAME = "SHA256SUMS"  # in the format of sha256sum, so that `sha256sum -c` reads it as well


def write(folder: Path) -> None:
    """Write the sums of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME and path.suffix in (".json", ".safetensors"))
    (folder / NAME).write_text("".join(f"{_sum(path)}  {path.relative_to(folder)}\n" for path in files))


def check(folder: Path) -> None:
    """Compare the files with the folder's own sums. A folder without sums is not checked.

    Raises:
        ModelError: a file is missing or has changed; the message names it.
    """
    sums = folder / NAME
    if not sums.exists():
        return
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing from the model")
        if _sum(path) != expected:
            raise ModelError(f"{path}: its SHA-256 sum is not the one in {sums}: the file is damaged or was changed")


def of_modules(modules: Iterable[torch.nn.Module]) -> str:
    """A digest of the modules' weights as they are in memory: names, shapes, types and values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
