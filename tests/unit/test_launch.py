"""The parent of several workers: one place reaps its children, whenever they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from latentline_worker.generate import launch
from latentline_worker.generate.launch import supervise, visible_devices

PATIENCE_S = 60  # how long a test waits before it fails; no test measures time
# Ends with the given status once its input ends; SIGTERM alone does not end it, as with a worker that drains.
DRAINS = 'trap : TERM; echo up; read line; exit "$0"'
OBEYS = 'trap "exit 0" TERM; echo up; read line; exit 9'


class Children:
    """Shells that are up; ``let_end`` closes the input that they read."""

    def __init__(self, *commands: Sequence[str]) -> None:
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self.processes = [subprocess.Popen(["sh", "-c", *command], stdin=stdin, stdout=stdout) for command in commands]
        os.close(stdin)
        os.close(stdout)
        up = b""
        while up.count(b"up") < len(commands):
            up += os.read(self._stdout, 100)

    def let_end(self) -> None:
        os.close(self._stdin)

    def codes(self) -> list[int]:
        os.close(self._stdout)
        return [process.returncode for process in self.processes]


def test_children_that_end_together_are_reaped_fifty_times_of_fifty() -> None:
    outcomes = []
    for _ in range(50):
        children = Children(*[(DRAINS, "0")] * 3)
        children.let_end()  # all of them end now
        outcomes.append((supervise(children.processes), children.codes()))
    assert outcomes == [(0, [0, 0, 0])] * 50


def test_one_status_that_is_not_zero_counts() -> None:
    children = Children((DRAINS, "0"), (DRAINS, "3"), (DRAINS, "0"))
    children.let_end()
    assert (supervise(children.processes), children.codes()) == (1, [0, 3, 0])


def test_when_one_child_ends_the_others_are_stopped() -> None:
    children = Children((OBEYS,), (OBEYS,))
    ended = subprocess.Popen(["sh", "-c", "exit 0"])
    assert supervise([ended, *children.processes]) == 0
    children.let_end()
    assert children.codes() == [0, 0]


def test_signals_are_unblocked_afterwards() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    supervise([subprocess.Popen(["sh", "-c", "exit 0"])])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


PARENT = """
import subprocess, sys
from latentline_worker.generate.launch import supervise

child = "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); os.write(1, b'u'); signal.pause()"
sys.exit(supervise([subprocess.Popen([sys.executable, "-S", "-c", child]) for _ in range(2)]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_parent_ends_its_children(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.read(2) == b"uu"  # both are up
    parent.send_signal(number)
    assert parent.wait(PATIENCE_S) == 0
    assert parent.stdout.read() == b""  # the children, which hold the other end, are gone as well
    parent.stdout.close()


@pytest.mark.parametrize(("chosen", "devices"), [("", []), ("-1", []), ("0", ["0"]), ("1,GPU-abc", ["1", "GPU-abc"])])
def test_visible_devices_are_those_that_the_environment_allows(monkeypatch: pytest.MonkeyPatch, chosen: str, devices: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_devices() == devices


def test_a_machine_without_the_driver_s_tool_has_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices() == []


def test_each_child_sees_one_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], str]] = []

    def popen(command: list[str], env: dict[str, str], preexec_fn: object) -> object:
        started.append((command[1:], env["CUDA_VISIBLE_DEVICES"]))
        return object()

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    launch._start_children(["0", "2"], ["--model", "m"])
    assert started == [(["-m", "latentline_worker.generate.launch", "--model", "m", "--device", one], one) for one in ("0", "2")]


def test_one_model_and_a_file_of_models_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENTLINE_MODEL", "a/b")
    assert launch.main(["--models", "models.toml"]) == 1
    assert capsys.readouterr().err == "latentline worker: models: got 'models.toml'; allowed: no file beside model, which the file names\n"
