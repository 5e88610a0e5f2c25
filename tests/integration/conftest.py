"""The whole stack, started once: real broker, real store, real API, real worker with the bundled model."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest

from latentline.errors import MissingExtra
from latentline_worker.embedded.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    try:
        running.start()
    except MissingExtra as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    yield running
    running.stop()


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client
