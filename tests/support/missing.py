"""What happens when something that a test needs is not installed."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(service: str) -> NoReturn:
    """A service that is not there skips on a laptop and fails in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{service} is missing, and CI must have it")
    pytest.skip(f"{service} is not installed")
