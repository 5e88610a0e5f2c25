"""``latentline up`` as an operator uses it: one line on stdout, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest


def descendants(pid: int) -> set[int]:
    """All processes below one, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def free_ports(number: int) -> int:
    """The first of so many loopback ports in a row that are free. Below those that the kernel gives to outgoing connections."""
    for first in range(21_000, 32_000, number):
        with contextlib.ExitStack() as opened:
            try:
                for port in range(first, first + number):
                    opened.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    pytest.fail("no free ports")


def start(tmp_path: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "latentline.cli", "up", "--port", "0", "--data-dir", str(tmp_path / "data"), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_serves_and_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    metrics_port = free_ports(3)
    process = start(tmp_path, LATENTLINE_METRICS_PORT=str(metrics_port))
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready http://127.0.0.1:"), process.communicate(timeout=30)
    url = line.split()[1]
    children = descendants(process.pid)
    assert len(children) >= 4  # broker, store, API, worker
    told = {"latentline_http_requests_total": 0, "latentline_callbacks_total": 1, "latentline_steps_total": 2}  # one of each role's own
    for name, offset in told.items():  # each role has a port of its own
        assert f"# TYPE {name} " in httpx.get(f"http://127.0.0.1:{metrics_port + offset}/metrics").text
    # A job in flight must not delay the end.
    assert httpx.post(f"{url}/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 100, "num_images": 8}).status_code == 202
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ""  # nothing was printed after the ready line
    assert all(f": http://127.0.0.1:{metrics_port + offset}/metrics\n" in err for offset in told.values())
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))


def test_a_hard_kill_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("ready")
    children = descendants(process.pid)
    process.kill()
    process.wait()
    for pid in children:
        _wait_gone(pid)
    process.stdout.close()
    process.stderr.close()


def _wait_gone(pid: int) -> None:
    # pidfd turns the end of a process that is not ours into something to wait for.
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 30)[0], f"process {pid} is left"
    finally:
        os.close(fd)


def test_a_broken_model_is_named_and_everything_stops(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{")
    process = start(tmp_path, "--model", str(model))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert f"{model}/model_index.json: not readable as JSON" in err and "Traceback" not in err


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "latentline.cli", "up", "--port", str(port), "--data-dir", str(tmp_path / "d")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"--port: {port} cannot be used" in done.stderr
