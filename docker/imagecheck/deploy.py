"""What ``deploy/`` says: the services of the compose file with their variables filled in, and the probes of the manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .engine import RunSpec
from .errors import CheckError

# ${NAME}, ${NAME:-default}, ${NAME:?message} and the doubled dollar, as the compose specification has them.
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::([-?])([^}]*))?\})")
MANIFESTS = {"api": "api.yaml", "worker": "worker.yaml", "callbacks": "callbacks.yaml"}
PORT = 8000  # of the API's command in its image


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Raises:
    CheckError: a variable without a default is not given.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name is None:
            return "$"
        if found := variables.get(name):
            return found
        if kind != "-":
            raise CheckError(f"deploy/compose.yaml needs {name}")
        return str(rest)

    return VARIABLE.sub(value, text)


def dockerfiles(root: Path) -> dict[str, Path]:
    """The images that the compose file builds, and from what."""
    services = yaml.safe_load((root / "deploy/compose.yaml").read_text())["services"]
    return {service["image"]: root / service["build"]["dockerfile"] for service in services.values() if "build" in service}


@dataclass(frozen=True)
class Probes:
    """What Kubernetes asks a container: a command inside of it, or a path of its port."""

    commands: tuple[tuple[str, ...], ...]
    paths: tuple[str, ...]


class Deploy:
    """The repository's ``deploy/``."""

    def __init__(self, root: Path, variables: Mapping[str, str], addresses: Mapping[str, str] | None = None) -> None:
        """``addresses`` says where this machine has what the compose file's own network has under another name."""
        self._folder = root / "deploy"
        text = interpolate((self._folder / "compose.yaml").read_text(), variables)
        for name, address in (addresses or {}).items():
            text = text.replace(f"@{name}/", f"@{address}/")
        self._services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]

    def spec(self, name: str, **environment: str) -> RunSpec:
        """A service as a container; ``environment`` goes before the file's."""
        service = self._services[name]
        return RunSpec(
            name=name,
            image=service["image"],
            command=tuple(service.get("command", ())),
            environment={key: str(value) for key, value in service["environment"].items()} | environment,
            read_only=service.get("read_only", False),
            tmpfs=tuple(service.get("tmpfs", ())),
            # A named volume is new for each check: only where it goes counts.
            volumes=tuple(volume.split(":")[1] for volume in service.get("volumes", ())),
            drop_capabilities=service.get("cap_drop") == ["ALL"],
            no_new_privileges="no-new-privileges:true" in service.get("security_opt", ()),
            init=service.get("init", False),
        )

    def grace_s(self, name: str) -> float:
        """How long the container may take to end: the shorter of compose file and manifest."""
        compose = str(self._services[name]["stop_grace_period"])
        if not re.fullmatch(r"\d+s", compose):
            raise CheckError(f"stop_grace_period of {name} is not a number of seconds: {compose}")
        return min(float(compose[:-1]), float(self._pod(name)["terminationGracePeriodSeconds"]))

    def probes(self, name: str) -> Probes:
        (container,) = self._pod(name)["containers"]
        found = [container[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in container]
        return Probes(
            commands=tuple(tuple(probe["exec"]["command"]) for probe in found if "exec" in probe),
            paths=tuple(probe["httpGet"]["path"] for probe in found if "httpGet" in probe),
        )

    def _pod(self, name: str) -> dict[str, Any]:
        documents = yaml.safe_load_all((self._folder / "kubernetes" / MANIFESTS[name]).read_text())
        pod: dict[str, Any] = next(d for d in documents if d["kind"] == "Deployment")["spec"]["template"]["spec"]
        return pod
