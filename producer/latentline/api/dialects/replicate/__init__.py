"""Replicate's HTTP API at ``/replicate/v1``: predictions, models, webhooks. ``docs/dialects.md`` has its tables."""

from .routes import create

__all__ = ["create"]
