"""latentline: prompt jobs for latent diffusion, over Redis, Celery workers and S3.

What applications import, without torch. The public names are those in ``__all__``; the clients and settings are imported on
first use, since they need more packages.
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
    JobNotEnded,
    JobNotFound,
    LatentlineError,
    NoWorker,
    ServiceUnavailable,
    StoreUnavailable,
    TenantQuotaExceeded,
    WaitTimeout,
)
from .jobs import (
    Callback,
    ImageRef,
    JobError,
    JobEvent,
    JobRecord,
    JobRequest,
    JobWarning,
    ModelInfo,
    Output,
    Phase,
    ResolvedRequest,
    Status,
)
from .models import ServedModel

if TYPE_CHECKING:
    from .async_client import AsyncClient
    from .client import Client
    from .operations import Outcome
    from .records import JobFilter
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
    "JobFilter",
    "JobNotEnded",
    "JobNotFound",
    "JobRecord",
    "JobRequest",
    "JobWarning",
    "LatentlineError",
    "ModelInfo",
    "NoWorker",
    "Outcome",
    "Output",
    "Phase",
    "ResolvedRequest",
    "ServedModel",
    "ServiceUnavailable",
    "Settings",
    "Status",
    "StoreUnavailable",
    "TenantQuotaExceeded",
    "WaitTimeout",
    "__version__",
]

_LAZY = {"Client": "client", "AsyncClient": "async_client", "JobFilter": "records", "Outcome": "operations", "Settings": "settings"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
