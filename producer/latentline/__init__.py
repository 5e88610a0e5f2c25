"""latentline: prompt jobs for latent diffusion, over Redis, Celery workers and S3.

The torch-free side: what applications import. Heavier names (the clients) are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BrokerUnavailable,
    ConfigurationError,
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    LatentlineError,
    ServiceUnavailable,
    StoreUnavailable,
    WaitTimeout,
)
from .jobs import Callback, ImageRef, JobError, JobEvent, JobRecord, JobRequest, ModelInfo, Output, Phase, Status

if TYPE_CHECKING:
    from .client import AsyncClient, Client
    from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BrokerUnavailable",
    "Callback",
    "Client",
    "ConfigurationError",
    "IdempotencyConflict",
    "ImageRef",
    "InvalidRequest",
    "JobError",
    "JobEvent",
    "JobFailed",
    "JobNotFound",
    "JobRecord",
    "JobRequest",
    "LatentlineError",
    "ModelInfo",
    "Output",
    "Phase",
    "ServiceUnavailable",
    "Settings",
    "Status",
    "StoreUnavailable",
    "WaitTimeout",
    "__version__",
]

_LAZY = {"Client": "client", "AsyncClient": "client", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
