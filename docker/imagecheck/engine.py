"""What the check asks of a container engine. Implementations: :mod:`.docker` and :mod:`.buildah`."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import CheckError


@dataclass(frozen=True)
class ImageConfig:
    """Of a built image, as Docker's format has it."""

    user: str
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    folder: str
    health: tuple[str, ...]  # the command of HEALTHCHECK; empty when the format or the builder dropped it
    stop_signal: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> ImageConfig:
        health = found.get("Healthcheck") or {}
        kind, *command = health.get("Test") or [""]
        if kind not in ("", "NONE", "CMD"):
            raise CheckError(f"a health check of kind {kind} is not known here: write it as CMD with a list")
        return cls(
            user=found.get("User") or "0",
            environment=dict(item.split("=", 1) for item in found.get("Env") or ()),
            entrypoint=tuple(found.get("Entrypoint") or ()),
            command=tuple(found.get("Cmd") or ()),
            folder=found.get("WorkingDir") or "/",
            health=tuple(command),
            stop_signal=found.get("StopSignal") or "SIGTERM",
        )


@dataclass(frozen=True)
class RunSpec:
    """One container as ``deploy/`` asks for it. All share this machine's loopback."""

    name: str
    image: str
    command: tuple[str, ...] = ()  # instead of the image's own
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of the image's
    read_only: bool = True
    tmpfs: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()  # folders of the container that are writable and owned as in the image
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    init: bool = False


@dataclass(frozen=True)
class Layer:
    """What one instruction added."""

    instruction: str
    num_bytes: int


@dataclass(frozen=True)
class Ended:
    """How a container ended after its stop signal."""

    status: int
    took_s: float
    killed: bool


class Container(Protocol):
    """A container that runs."""

    name: str

    def execute(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in it, with its user, its environment and its rights, as a health check does."""

    def alive(self) -> bool: ...

    def log(self) -> str: ...

    def stop(self, grace_s: float) -> Ended:
        """The image's stop signal, and a kill once the time is over."""


class Engine(Protocol):
    """Builds images and runs them."""

    name: str
    shares_ports: bool  # containers use this machine's ports; otherwise the check has a network of its own

    def build(self, dockerfile: Path, context: Path, tag: str) -> None: ...

    def config(self, tag: str) -> ImageConfig: ...

    def layers(self, tag: str) -> list[Layer]:
        """From the base up, without those that only hold settings."""

    def start(self, spec: RunSpec) -> Container: ...

    def once(self, tag: str, script: str, out: Path) -> None:
        """Run a shell script as root in a container that is thrown away, with ``out`` mounted there as /out."""

    def close(self) -> None:
        """Remove what was started and mounted."""
