"""Docker or Podman, where one is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from .commands import logged, output
from .engine import Container, Ended, ImageConfig, Layer, RunSpec
from .pip_access import PipAccess

PIP_CONFIG = "/etc/pip.conf"
PREFIX = "latentline-check-"


def find() -> str | None:
    """The program of an engine that answers."""
    for program in ("docker", "podman"):
        if shutil.which(program) and subprocess.run([program, "info"], capture_output=True).returncode == 0:
            return program
    return None


class DockerContainer:
    def __init__(self, program: str, spec: RunSpec) -> None:
        self._program, self.name, self._id = program, spec.name, PREFIX + spec.name

    def execute(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._program, "exec", self._id, *command], capture_output=True, text=True)

    def alive(self) -> bool:
        return output([self._program, "inspect", "--format", "{{.State.Running}}", self._id]).strip() == "true"

    def log(self) -> str:
        result = subprocess.run([self._program, "logs", self._id], capture_output=True, text=True)
        return result.stdout + result.stderr

    def stop(self, grace_s: float) -> Ended:
        started = time.monotonic()
        output([self._program, "stop", "--time", f"{grace_s:.0f}", self._id])
        took_s = time.monotonic() - started
        status = int(output([self._program, "inspect", "--format", "{{.State.ExitCode}}", self._id]))
        self.remove()
        return Ended(status, took_s, killed=status == 137)

    def remove(self) -> None:
        subprocess.run([self._program, "rm", "--force", "--volumes", self._id], capture_output=True)


class Docker:
    """The base image comes from its registry, as the engine is configured."""

    shares_ports = True

    def __init__(self, program: str, work: Path, pip: PipAccess) -> None:
        self.name = program
        self._work = work
        self._containers: list[DockerContainer] = []
        # Only Podman's build can mount; Docker's reaches the package index as its daemon does.
        self._mounts: list[str] = []
        if program == "podman":
            config = work / "pip.conf"
            config.write_text(pip.config)
            self._mounts = [f"--volume={config}:{PIP_CONFIG}:ro", *(f"--volume={path}:{path}:ro" for path in pip.paths)]

    def build(self, dockerfile: Path, context: Path, tag: str) -> None:
        # Podman's own format drops HEALTHCHECK.
        options = ["--format=docker", "--network=host", *self._mounts] if self.name == "podman" else []
        command: list[str | Path] = [self.name, "build", *options, "--file", dockerfile, "--tag", tag, context]
        logged(f"building {tag}", command, self._work / f"build-{dockerfile.name}.log")

    def config(self, tag: str) -> ImageConfig:
        (found,) = json.loads(output([self.name, "image", "inspect", tag]))
        config = found["Config"]
        config.setdefault("Healthcheck", found.get("HealthCheck"))  # where Podman has it
        return ImageConfig.of(config)

    def layers(self, tag: str) -> list[Layer]:
        listing = output([self.name, "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", tag])
        found = [line.split("\t", 1) for line in listing.splitlines() if line]
        return [Layer(instruction, int(size)) for size, instruction in reversed(found) if int(size)]

    def start(self, spec: RunSpec) -> Container:
        container = DockerContainer(self.name, spec)
        container.remove()  # left by a check that was killed
        options = [f"--env={name}={value}" for name, value in spec.environment.items()]
        options += [f"--tmpfs={path}" for path in spec.tmpfs] + [f"--volume={path}" for path in spec.volumes]
        options += ["--read-only"] * spec.read_only + ["--init"] * spec.init + ["--cap-drop=ALL"] * spec.drop_capabilities
        options += ["--security-opt=no-new-privileges"] * spec.no_new_privileges
        self._containers.append(container)
        output([self.name, "run", "--detach", "--network=host", f"--name={PREFIX}{spec.name}", *options, spec.image, *spec.command])
        return container

    def once(self, tag: str, script: str, out: Path) -> None:
        command = [self.name, "run", "--rm", "--network=host", "--user=0", *self._mounts, f"--volume={out}:/out"]
        logged(f"a tool in {tag}", [*command, "--entrypoint=sh", tag, "-euc", script], self._work / "tool.log")

    def close(self) -> None:
        for container in self._containers:
            container.remove()
