"""OpenAI's images API at ``/openai/v1``: ``images/generations`` and ``models``. ``docs/dialects.md`` has its tables."""

from .routes import create

__all__ = ["create"]
