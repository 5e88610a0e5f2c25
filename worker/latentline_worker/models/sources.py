"""Finds the files of a model on this machine: a folder, a single file with a folder of configurations, or the hub's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentline.errors import ModelError

from . import folder as folders
from . import hub, layouts

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, before anything of them is loaded."""

    folder: Path
    """In diffusers' format. Of a single file it has the configurations and tokenizers, and the weights that the file lacks."""
    index: Mapping[str, Any]
    """The folder's ``model_index.json``."""
    checkpoint: layouts.Checkpoint | None = None

    def __str__(self) -> str:
        return str(self.checkpoint.path if self.checkpoint else self.folder)

    def outside(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these parts whose weights are in the folder."""
        inside = self.checkpoint.parts() if self.checkpoint else set()
        return tuple(part for part in parts if part not in inside)


def name_of(source: str) -> str:
    """Under which a model of this source is served where nothing else is said; nothing is looked up."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return path.stem
    if _path(source) is not None:
        return path.expanduser().resolve().name
    return source.partition("@")[0]


def find(source: str, config: str | None = None) -> ModelFiles:
    """The files of a folder in diffusers' format, a single ``.safetensors`` file, or a hub id.

    Args:
        source: the path, or ``owner/name`` or ``owner/name@revision``.
        config: of a single file: a folder in diffusers' format or a hub id with its configurations and tokenizers. By default the
            published model of which diffusers takes them, from the hub's cache.

    Raises:
        ModelError: they are missing, or of a kind that is not loaded; the message names the field or the file.
    """
    path = _path(source)
    if path is not None and path.suffix == ".safetensors":
        return _single(path, config)
    if config is not None:
        raise ModelError(f"config: got {config!r}; allowed: none: only a single .safetensors file takes its configuration from elsewhere")
    if path is not None:
        if path.suffix in PICKLES and not path.is_dir():
            raise ModelError(
                f"source: got {source!r}; allowed: a .safetensors file, a folder or a hub id: {path.suffix} files are pickles, which "
                "run code when they are read, so none is loaded"
            )
        if not path.is_dir():
            raise ModelError(f"source: got {source!r}; allowed: a model folder or .safetensors file that exists; {path} is neither")
        return ModelFiles(path, folders.read_index(path))
    found = hub.model(*hub.split("source", source))
    return ModelFiles(found, folders.read_index(found))


def _single(path: Path, config: str | None) -> ModelFiles:
    if not path.is_file():
        raise ModelError(f"source: got {str(path)!r}; allowed: a .safetensors file that exists")
    checkpoint = layouts.read(path)
    lacking = set(checkpoint.layout.parts) - checkpoint.parts()
    wanted = config or checkpoint.usual_config()
    found = _path(wanted)
    if found is None:
        found = hub.configs(*hub.split("config", wanted), lacking)
    elif not found.is_dir():
        raise ModelError(f"config: got {wanted!r}; allowed: a folder in diffusers' format that exists, or a hub id")
    index = folders.read_index(found)
    if index.get("_class_name") not in checkpoint.layout.pipelines:
        raise ModelError(
            f"config: got {wanted!r}, which is of a {index.get('_class_name')!r}; allowed for {path}, which has the layout of "
            f"{checkpoint.layout.title}: one of {', '.join(checkpoint.layout.pipelines)}"
        )
    return ModelFiles(found, index, checkpoint)


def _path(text: str) -> Path | None:
    """As a path, if it names something that exists or cannot be a hub id."""
    path = Path(text).expanduser()
    is_file_name = path.suffix in (".safetensors", *PICKLES)
    return path.resolve() if path.exists() or text.startswith(("/", ".", "~")) or is_file_name else None
