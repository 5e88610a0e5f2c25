"""Environment variables: what ``deploy/`` sets is what the code reads, and what the code reads is set or shown there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentline.settings import Settings
from latentline_worker.settings import ProcessSettings, WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "deploy/compose.yaml").read_text()
KUBERNETES = ROOT / "deploy/kubernetes"
START = (ROOT / "deploy/valkey/start.sh").read_text()
# What each process validates at its start.
READS: dict[str, type[Settings]] = {"api": Settings, "worker": WorkerSettings, "callbacks": ProcessSettings}
# Read by a program that is not ours: the NVIDIA runtime.
FOREIGN = {"NVIDIA_VISIBLE_DEVICES"}
# Where the command line finds the API, its key, and what `latentline mcp` gives to agents: nothing that a container needs.
OF_CLIENTS = {"LATENTLINE_URL", "LATENTLINE_API_KEY", "LATENTLINE_MCP_WAIT_S", "LATENTLINE_MCP_MAX_BYTES"}


def variables(settings: type[Settings]) -> set[str]:
    return {f"LATENTLINE_{name.upper()}" for name in settings.model_fields}


def compose_sets() -> dict[str, set[str]]:
    services: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
    return {name: set(service.get("environment", {})) for name, service in services.items()}


def shown(text: str) -> dict[str, str]:
    """Variables in lines that are commented out, with the value that they show."""
    return dict(re.findall(r"^\s*# (LATENTLINE_\w+): \"?([^\"\s]+)", text, re.M))


def pod_sets(role: str) -> set[str]:
    """Of a pod: those that it names and those of the secrets that it takes whole."""
    pod = next(d for d in yaml.safe_load_all((KUBERNETES / f"{role}.yaml").read_text()) if d["kind"] == "Deployment")
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    secrets = {s["metadata"]["name"]: set(s["stringData"]) for s in yaml.safe_load_all((KUBERNETES / "secret.example.yaml").read_text())}
    taken = [secrets[source["secretRef"]["name"]] for source in container.get("envFrom", [])]
    return {variable["name"] for variable in container.get("env", [])}.union(*taken)


@pytest.mark.parametrize("role", READS)
def test_a_role_is_given_only_what_it_reads(role: str) -> None:
    known = variables(READS[role]) | FOREIGN
    assert compose_sets()[role] <= known
    assert pod_sets(role) <= known


def test_every_setting_is_set_or_shown_in_the_compose_file() -> None:
    dockerfiles = [path.read_text() for path in (ROOT / "docker").glob("Dockerfile.*")]
    in_images = {name for text in dockerfiles for name in re.findall(r"^ENV (LATENTLINE_\w+)=", text, re.M)}
    given = set().union(*compose_sets().values(), shown(COMPOSE), in_images)
    assert variables(WorkerSettings) == {name for name in given if name.startswith("LATENTLINE_")}


@pytest.mark.parametrize("role", READS)
def test_a_role_is_shown_only_what_it_reads(role: str) -> None:
    (block,) = re.findall(rf"^  {role}:\n((?:    .*\n|\n)+)", COMPOSE, re.M)
    assert shown(block).keys() <= variables(READS[role])
    assert shown(block)


def test_what_is_shown_is_accepted() -> None:
    for name, value in shown(COMPOSE).items():
        WorkerSettings.from_variables({name: value})


def test_the_broker_is_given_the_passwords_that_its_start_reads() -> None:
    read = set(re.findall(r"\$\{(VALKEY_\w+_PASSWORD):\?\}", START))
    assert compose_sets()["broker"] == read == {f"VALKEY_{role}_PASSWORD" for role in ("PRODUCER", "WORKER", "CALLBACKS", "OPERATOR")}


def test_the_store_is_given_the_keys_that_its_start_reads() -> None:
    read = set(re.findall(r"\$\{(S3_\w+):\?\}", (ROOT / "deploy/seaweedfs/start.sh").read_text()))
    assert (
        compose_sets()["store"]
        == read
        == {f"S3_{whose}{key}" for whose in ("", "READER_") for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    )


def test_the_code_names_no_variable_that_does_not_exist() -> None:
    """In messages and elsewhere; settings themselves are never read by name."""
    sources = [path for root in ("producer", "worker") for path in (ROOT / root).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bLATENTLINE_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())}
    assert named <= variables(WorkerSettings) | OF_CLIENTS
