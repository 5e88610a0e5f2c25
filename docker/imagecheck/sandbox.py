"""A container of Linux namespaces, for machines that build with buildah and have no engine to run what they built.

Process ids, mounts, host name and inter-process communication are its own; its root is read-only; it shares the network of
whoever starts it. Its first process is the image's own command, without an init before it, as in a Kubernetes pod.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentline_worker.embedded.process import Child

from .engine import Ended, ImageConfig, RunSpec
from .errors import CheckError

DEVICES = ("full", "null", "random", "urandom", "zero")
START_TIMEOUT_S = 30.0


class Sandbox:
    def __init__(self, spec: RunSpec, config: ImageConfig, root: Path, volumes: Mapping[str, Path], log: Path) -> None:
        if not spec.read_only:
            raise CheckError(f"{spec.name}: without a container engine only read-only containers can be run")
        self.name = spec.name
        self._spec, self._config = spec, config
        self._environment = {**config.environment, "HOME": _home(root, config.user), **spec.environment}
        self._log = log
        command = self._confined([*config.entrypoint, *(spec.command or config.command)], "--pdeathsig", "SIGKILL")
        script = "\n".join([*_mounts(root, spec.tmpfs, volumes), "exec " + shlex.join(["chroot", str(root), *command])])
        # A process that changes its user loses --kill-child's signal, so setpriv asks for it again: nothing outlives the check.
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
        self._child = Child(spec.name, [*unshare, "sh", "-euc", script], log, self._environment)

    def _confined(self, command: Sequence[str], *options: str) -> list[str]:
        """The command inside, from the image's folder and with the image's user."""
        user, _, group = self._config.user.partition(":")
        rights = ["--reuid", user, "--regid", group or user, "--clear-groups"]
        rights += ["--inh-caps=-all", "--bounding-set=-all"] * self._spec.drop_capabilities
        rights += ["--no-new-privs"] * self._spec.no_new_privileges
        return ["env", "--chdir", self._config.folder, "setpriv", *options, *rights, *command]

    @property
    def _first(self) -> int:
        """The process that is number one inside, by its number outside."""
        parent = self._child.process.pid
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if not found:
            raise CheckError(f"{self.name} has ended: {self._child.tail()}")
        return int(found[0])

    def execute(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", str(self._first), "--mount", "--pid", "--ipc", "--uts", "--root", "--"]
        return subprocess.run([*enter, *self._confined(command)], capture_output=True, text=True, env=self._environment)

    def alive(self) -> bool:
        return self._child.alive

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self, grace_s: float) -> Ended:
        started = time.monotonic()
        if not self.alive():
            return Ended(self._child.process.wait(), 0.0, killed=False)
        os.kill(self._first, signal.Signals[self._config.stop_signal])
        try:
            status = self._child.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return Ended(self._child.process.wait(), time.monotonic() - started, killed=True)
        self._child.stop()
        return Ended(status, time.monotonic() - started, killed=False)

    def kill(self) -> None:
        """The kernel ends every process inside with the first one."""
        if self.alive():
            os.kill(self._first, signal.SIGKILL)
            self._child.process.wait()
        self._child.stop()


def _mounts(root: Path, tmpfs: Sequence[str], volumes: Mapping[str, Path]) -> list[str]:
    """Shell lines that make the root read-only and mount what every container has."""
    at = shlex.quote(str(root))
    lines = [
        f"mount --bind {at} {at}",
        f"mount -o remount,bind,ro {at}",
        f"mount -t proc proc {at}/proc",
        f"mount -t tmpfs -o mode=755,nosuid tmpfs {at}/dev",
        f"mkdir {at}/dev/shm",
        f"mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {at}/dev/shm",
    ]
    for device in DEVICES:
        lines += [f"touch {at}/dev/{device}", f"mount --bind /dev/{device} {at}/dev/{device}"]
    lines += [f"mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {shlex.quote(f'{root}{path}')}" for path in tmpfs]
    lines += [f"mount --bind {shlex.quote(str(source))} {shlex.quote(f'{root}{path}')}" for path, source in volumes.items()]
    return lines


def _home(root: Path, user: str) -> str:
    """The home folder of a user's number, as an engine finds it."""
    number = user.partition(":")[0]
    lines = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    return next((fields[5] for fields in lines if fields[2] == number), "/")
