"""The API of AUTOMATIC1111's web UI at ``/sdapi/v1``. ``docs/dialects.md`` has its tables."""

from .routes import create

__all__ = ["create"]
