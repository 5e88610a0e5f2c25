"""A child process that never outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from latentline.errors import ConfigurationError

from .orphans import die_with_parent

LOG_TAIL_LINES = 12


def free_port(offset: int = 0) -> int:
    """A loopback port that is free now; with an ``offset``, the port that far above it is free too."""
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if not offset:
            return port
        # The kernel assigns high ports; with an offset they may exceed the range.
        port = port if port + offset < 65536 else port - offset
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
    raise ConfigurationError("no free loopback port found")


class Child:
    """One service process: its log in a file, stopped by SIGTERM and then by SIGKILL.

    It runs in a session of its own, so that Ctrl-C reaches only the parent, which then stops its children in order; and
    the kernel stops it when the parent is killed (:func:`latentline_worker.embedded.orphans.die_with_parent`).
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.log = log
        self._stream = log.open("ab")
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._stream,
                stderr=self._stream,
                env=dict(env),
                start_new_session=True,
                pass_fds=pass_fds,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            self._stream.close()
            raise ConfigurationError(f"{name} cannot be started: {error}") from error

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once ``ready()`` is true.

        Raises:
            ConfigurationError: the child ended or the time ran out first; the message ends with its log's last lines.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise ConfigurationError(f"{self.name} ended with status {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"{self.name} was not ready after {timeout_s:g} s:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the child by SIGTERM; if it is still alive after ``timeout_s``, kill it and everything in its session."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._stream.close()


def clean_env(**extra: str) -> dict[str, str]:
    """This environment without other LATENTLINE and AWS settings, which must not leak into embedded services."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LATENTLINE_", "AWS_"))}
    return kept | extra
