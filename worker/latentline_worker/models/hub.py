"""Models from the hub: taken from its cache on this machine, and fetched into it where the hub may be asked.

``HF_HOME``, ``HF_HUB_CACHE``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` apply as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import diffusers
import httpx
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from latentline.errors import ModelError

ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
CONFIGS = ("*.json", "*.txt", "*.model")  # configurations, vocabularies and tokenizers
_FAILURES = (OSError, ValueError, HfHubHTTPError, httpx.HTTPError)  # what a hub that is away or says no raises


def split(field: str, text: str) -> tuple[str, str | None]:
    """(id, revision) of ``owner/name`` or ``owner/name@revision``.

    Raises:
        ModelError: it is neither.
    """
    name, at, revision = text.partition("@")
    if not ID.fullmatch(name) or (at and not REVISION.fullmatch(revision)):
        raise ModelError(f"{field}: got {text!r}; allowed: a path, or a hub id with or without a revision (owner/name@revision)")
    return name, revision or None


def model(name: str, revision: str | None) -> Path:
    """The folder of a whole model in the cache, safetensors only.

    Raises:
        ModelError: it is not there and cannot be fetched; the message says how to.
    """
    try:
        return Path(diffusers.DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    except _FAILURES as error:
        raise _missing("source", name, revision, (), error) from error


def configs(name: str, revision: str | None, parts: Iterable[str]) -> Path:
    """The folder of a model's configurations and tokenizers in the cache, with the weights of these parts.

    Raises:
        ModelError: it is not there and cannot be fetched; the message says how to.
    """
    patterns = (*CONFIGS, *(f"{part}/*.safetensors" for part in sorted(parts)))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except _FAILURES as error:
        raise _missing("config", name, revision, patterns, error) from error


def _missing(field: str, name: str, revision: str | None, patterns: Iterable[str], error: Exception) -> ModelError:
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    command += "".join(f" --include '{pattern}'" for pattern in patterns)
    return ModelError(
        f"{field}: {name}{f'@{revision}' if revision else ''} is not in the hub cache ({constants.HF_HUB_CACHE}) and was not fetched "
        f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}); allowed: a model that is there: "
        f"fetch it with `{command}`"
    )
