"""Operations on the broker of the settings, for commands that do not go through the API."""

from __future__ import annotations

import contextlib
from typing import TypeVar

from latentline import records
from latentline.connection import connect
from latentline.settings import Settings

from .errors import check_settings

T = TypeVar("T")


def run(operation: records.Operation[T]) -> T:
    """The result of one operation."""
    check_settings()
    with contextlib.closing(connect(Settings().redis_url.get_secret_value())) as client:
        return records.run(client, operation)
