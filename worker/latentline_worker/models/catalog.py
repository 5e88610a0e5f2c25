"""The TOML file that names the models of a worker: one entry each. Unknown keys and impossible values are refused by name."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentline.errors import ConfigurationError
from latentline.requests import MAX_KEY_CHARS, Guidance, Scheduler, Side, Steps, allowed_by

from . import bundled_model, sources

Name = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Defaults(_Strict):
    """What a request gets that leaves these out; what is not given here is the family's, or the authors'."""

    scheduler: Scheduler | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    width: Side | None = None
    height: Side | None = None


class ModelEntry(_Strict):
    """One model: where its files are, and how it is served."""

    source: Name
    """The bundled model's id, a folder in diffusers' format, a ``.safetensors`` file, or a hub id."""
    id: Annotated[str, Field(max_length=MAX_KEY_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = None
    """Under which jobs request it; by default the folder's or file's name, or the hub id."""
    config: Name | None = None
    """Of a single file: the folder or hub id of its configurations and tokenizers."""
    revision: Name | None = None
    """Of a hub id: a commit, tag or branch."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    """By default that of the worker's settings."""
    lora_dir: Path | None = None
    """A folder of LoRA adapters that jobs may name."""
    defaults: Defaults = Defaults()

    @model_validator(mode="after")
    def _one_revision(self) -> ModelEntry:
        if self.revision and "@" in self.source:
            raise ValueError(f"one revision: {self.source!r} names one already")
        return self

    @property
    def name(self) -> str:
        """The id under which it is served."""
        return self.id or (self.source if self.source == bundled_model.MODEL_ID else sources.name_of(self.source))

    @property
    def location(self) -> str:
        """The source with its revision."""
        return f"{self.source}@{self.revision}" if self.revision else self.source


class Catalog(_Strict):
    """What a file says."""

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    weights_mb: Annotated[float, Field(gt=0)] | None = None
    """What the weights of the models that are in memory together may take; by default most of what is free, or all of them."""
    cold_wait_s: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    """How long a job waits for workers that have its model in memory before this worker loads the model for it."""


def read(path: Path) -> Catalog:
    """What a file says, with paths that begin with a dot or ``~`` made absolute: they start from the file's folder.

    Raises:
        ConfigurationError: it cannot be read, or says something that has no meaning; names the field, the value and what is allowed.
    """
    try:
        return parse(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"models: got {str(path)!r}; allowed: a TOML file that can be read: {error}") from None


def parse(text: str, path: Path) -> Catalog:
    """What a file's text says; ``path`` is the file's.

    Raises:
        ConfigurationError: as :func:`read`.
    """
    try:
        found = Catalog.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {problem(error)}") from None
    entries = tuple(absolute(entry, path.parent) for entry in found.models)
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        if entry.name in seen:
            raise ConfigurationError(f"{path}: models.{number}.id: got {entry.name!r}; allowed: one that no other model of the file has")
        seen.add(entry.name)
    return found.model_copy(update={"models": entries})


def append(path: Path, entry: ModelEntry) -> None:
    """Add a model to a file, which is made if it does not exist. It is replaced in one step, so that a reader sees all or nothing.

    Raises:
        ConfigurationError: the file would no longer be one that :func:`read` takes.
    """
    text = with_entry(path, entry)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


def with_entry(path: Path, entry: ModelEntry) -> str:
    """The text of a file with one more model.

    Raises:
        ConfigurationError: :func:`read` would not take it.
    """
    try:
        before = path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"models: got {str(path)!r}; allowed: a TOML file that can be read: {error}") from None
    text = f"{before.rstrip()}\n\n{_as_toml(entry)}".lstrip()
    parse(text, path)
    return text


def _as_toml(entry: ModelEntry) -> str:
    given = entry.model_dump(mode="json", exclude_none=True)
    defaults = given.pop("defaults")
    lines = ["[[models]]", *_lines(given)]
    return "\n".join([*lines, "[models.defaults]", *_lines(defaults)] if defaults else lines) + "\n"


def _lines(fields: Mapping[str, Any]) -> list[str]:
    # A JSON string or number is one of TOML as well, except for characters beyond 16 bits that are written as two escapes.
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]


def absolute(entry: ModelEntry, folder: Path) -> ModelEntry:
    """The entry with paths that begin with a dot or ``~`` made absolute: they start from ``folder``, that of its file."""

    def made(text: str | Path | None) -> str | None:
        if text is None or not str(text).startswith((".", "~")):
            return None if text is None else str(text)
        return str((folder / Path(text).expanduser()).resolve())

    lora_dir = (folder / entry.lora_dir.expanduser()).resolve() if entry.lora_dir else None
    return entry.model_copy(update={"source": made(entry.source), "config": made(entry.config), "lora_dir": lora_dir})


def problem(error: ValidationError, above: tuple[str, ...] = ()) -> str:
    """The first problem, with the field, the value and what is allowed; ``above`` is where in a file the fields stand."""
    first = error.errors(include_url=False)[0]
    place, allowed = (*above, *first["loc"]), allowed_by(first)
    if first["type"] == "extra_forbidden":
        owner: type[BaseModel] = Defaults if "defaults" in place[:-1] else ModelEntry if len(place) > 1 else Catalog
        allowed = f"only the known keys: {', '.join(owner.model_fields)}"
    if first["type"] == "too_short":
        allowed = "at least one model"
    value = "nothing" if first["type"] == "missing" else repr(first.get("input"))
    return f"{'.'.join(map(str, place))}: got {value[:80]}; allowed: {allowed}"
