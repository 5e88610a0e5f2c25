"""``docker/check``: what it reads of pip and of ``deploy/``, and how it refuses a machine that cannot build."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docker"))

from imagecheck import base, buildah, commands, docker, pip_access  # noqa: E402
from imagecheck.deploy import Deploy, interpolate  # noqa: E402
from imagecheck.engine import ImageConfig, RunSpec  # noqa: E402
from imagecheck.errors import CheckError  # noqa: E402
from imagecheck.trial import problems  # noqa: E402

VARIABLES = {
    **{f"VALKEY_{role}_PASSWORD": "p" for role in ("PRODUCER", "WORKER", "CALLBACKS", "OPERATOR")},
    "S3_READER_ACCESS_KEY_ID": "r",
    "S3_READER_SECRET_ACCESS_KEY": "t",
    "S3_ACCESS_KEY_ID": "a",
    "S3_SECRET_ACCESS_KEY": "s",
}


def check(path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with only the programs of a folder in reach."""
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run([sys.executable, ROOT / "docker/check"], env=env, capture_output=True, text=True, timeout=60)


# What a build is given of pip.


def test_pip_settings_of_files_and_variables_become_one_file() -> None:
    listing = "\n".join(
        [
            ":env:.index-url='https://mirror.example/simple'",
            "global.index-url='https://other.example/simple'",
            "global.require-virtualenv='true'",
            "install.extra-index-url='https://a.example https://b.example\\nhttps://c.example'",
        ]
    )
    found = pip_access.access(pip_access.parse(listing), {})
    assert found.config.splitlines() == [
        "[global]",
        "extra-index-url = https://a.example",
        "    https://b.example",
        "    https://c.example",
        "index-url = https://mirror.example/simple",
    ]
    assert found.paths == ()


def test_files_that_pip_needs_are_mounted(tmp_path: Path) -> None:
    for name in ("index/simple", "wheels"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("constraints.txt", "wheels/ca.pem"):
        (tmp_path / name).touch()
    values = {
        "extra-index-url": f"file://{tmp_path}/index/simple https://pypi.org/simple",
        "find-links": f"{tmp_path}/wheels",
        "constraint": f"{tmp_path}/constraints.txt",
        "client-cert": f"{tmp_path}/missing.pem",
    }
    found = pip_access.access(values, {"SSL_CERT_FILE": f"{tmp_path}/wheels/ca.pem"})
    # Of the index the folder above it, for its pages link to files there; and nothing twice.
    assert found.paths == (tmp_path / "constraints.txt", tmp_path / "index", tmp_path / "wheels")
    assert f"cert = {tmp_path}/wheels/ca.pem" in found.config


def test_a_configured_certificate_goes_before_the_environment() -> None:
    found = pip_access.access({"cert": "/one.pem"}, {"REQUESTS_CA_BUNDLE": "/two.pem"})
    assert "cert = /one.pem" in found.config and "two" not in found.config


# What deploy/ says.


@pytest.mark.parametrize(
    ("text", "expected"),
    [("${A}", "x"), ("${A:-y}", "x"), ("${B:-y}", "y"), ("${B:-}", ""), ("$$A", "$A"), ("${A:?why}", "x")],
)
def test_compose_variables_are_filled_in(text: str, expected: str) -> None:
    assert interpolate(text, {"A": "x"}) == expected


def test_a_variable_without_a_default_has_to_be_given() -> None:
    with pytest.raises(CheckError, match="needs S3_ACCESS_KEY_ID"):
        interpolate("${S3_ACCESS_KEY_ID:?see deploy/.env.example}", {})


@pytest.mark.parametrize("name", ["api", "worker", "callbacks"])
def test_services_are_run_as_deploy_says(name: str) -> None:
    deploy = Deploy(ROOT, VARIABLES)
    spec = deploy.spec(name, EXTRA="1")
    assert spec.read_only and spec.drop_capabilities and spec.no_new_privileges and spec.init
    assert spec.tmpfs == ("/tmp",)
    assert spec.environment["EXTRA"] == "1" and "LATENTLINE_REDIS_URL" in spec.environment
    assert deploy.grace_s(name) == 30
    assert bool(deploy.probes(name).commands) != bool(deploy.probes(name).paths)


def test_the_broker_is_found_where_the_check_started_it() -> None:
    spec = Deploy(ROOT, VARIABLES, {"broker:6379": "127.0.0.1:1234"}).spec("worker")
    assert spec.environment["LATENTLINE_REDIS_URL"] == "redis://worker:p@127.0.0.1:1234/0"


# Images.


@pytest.mark.parametrize("dockerfile", sorted((ROOT / "docker").glob("Dockerfile.*")), ids=lambda p: p.name)
def test_there_is_a_stand_in_for_each_base(dockerfile: Path) -> None:
    assert base.suite(base.image_name(dockerfile)) in base.SUITES.values()


@pytest.mark.parametrize("image", ["python:3.9.1-slim-bullseye", "python:3.11.14-alpine", "debian:12"])
def test_a_base_without_a_stand_in_is_refused(image: str) -> None:
    with pytest.raises(CheckError, match=image):
        base.suite(image)


def test_an_image_that_lost_its_health_check_is_seen() -> None:
    found = ImageConfig.of({"User": "10001:10001", "Env": ["A=b=c"], "Entrypoint": ["latentline"], "Cmd": None})
    assert (found.user, found.environment, found.command, found.health) == ("10001:10001", {"A": "b=c"}, (), ())
    with pytest.raises(CheckError, match="CMD-SHELL"):
        ImageConfig.of({"Healthcheck": {"Test": ["CMD-SHELL", "true"]}})


@pytest.mark.parametrize(
    ("driver", "history", "expected"),
    [
        ("overlay", [("debootstrap", False), ("ENV A=b", True), ("RUN x", False)], [("debootstrap", 200), ("RUN x", 30)]),
        ("vfs", [("debootstrap", False), ("RUN x", False), ("RUN y", False)], [("the base image", 200), ("all instructions", 30)]),
    ],
    ids=["a layer for each instruction", "one layer for all"],
)
def test_layers_are_weighed_from_the_base_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, history: list[tuple[str, bool]], expected: list[tuple[str, int]]
) -> None:
    def put(kind: str, content: object) -> None:
        path = tmp_path / f"storage/{driver}-{kind}/{kind}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))

    put("layers", [{"id": "top", "parent": "base", "diff-size": 30}, {"id": "other"}, {"id": "base", "diff-size": 200}])
    put("images", [{"id": "unnamed", "layer": "other"}, {"names": ["localhost/image:1"], "layer": "top"}])
    engine = buildah.Buildah.__new__(buildah.Buildah)  # its constructor needs root
    monkeypatch.setattr(engine, "_work", tmp_path, raising=False)
    monkeypatch.setattr(engine, "_driver", driver, raising=False)
    entries = [{"created_by": instruction, "empty_layer": empty} for instruction, empty in history]
    monkeypatch.setattr(engine, "_inspect", lambda _: {"history": entries})
    assert [(layer.instruction, layer.num_bytes) for layer in engine.layers("image:1")] == expected


def test_a_command_that_fails_says_its_last_line() -> None:
    assert commands.output(["sh", "-c", "echo out"]) == "out\n"
    with pytest.raises(CheckError, match=r"^sh ended with status 3: no space left$"):
        commands.output(["sh", "-c", "echo first; echo no space left >&2; exit 3"])


def test_a_long_command_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"(?s)^building failed with status 1:.*line 40$") as refused:
        commands.logged("building", ["sh", "-c", "seq -f 'line %g' 40; exit 1"], tmp_path / "log")
    assert len(str(refused.value).splitlines()) == commands.TAIL_LINES + 1


SEEN = {
    "user": ["10001"] * 4, "capabilities": 0, "no_new_privileges": 1, "read_only": True,
    "compilers": [], "caches": [], "tests": [], "torch": ["2.13.0"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"user": ["0"] * 4}, "root"),
        ({"user": ["1000"] * 4}, "1000"),
        ({"capabilities": 1}, "capabilities"),
        ({"no_new_privileges": 0}, "privileges"),
        ({"read_only": False}, "written"),
        ({"compilers": ["gcc"]}, "gcc"),
        ({"caches": ["/root/.cache"]}, "cache"),
        ({"tests": ["/site/numpy/tests"]}, "tests"),
        ({"torch": ["2.13.0", "2.12.0"]}, "more than once"),
    ],
)
def test_what_is_seen_inside_is_held_against_deploy(change: Mapping[str, object], says: str | None) -> None:
    found = problems(SEEN | dict(change), RunSpec("worker", "image"), "10001:10001")
    assert found == [] if says is None else any(says in text for text in found)


# Machines that cannot build: one sentence each.


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("docker/check: ")
    return line


def test_no_buildah(tmp_path: Path) -> None:
    assert "apt-get install buildah debootstrap" in one_sentence(check(str(tmp_path), TMPDIR=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_work_in(tmp_path: Path) -> None:
    assert "missing" in one_sentence(check(str(tmp_path), TMPDIR=f"{tmp_path}/missing"))


@pytest.mark.parametrize(
    ("user", "free", "says"),
    [(1000, 1e12, "needs root"), (0, 1e9, "GB free in .* and there are 1.0")],
    ids=["no root", "no space"],
)
def test_no_root_and_no_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int, free: float, says: str) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(buildah.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(buildah.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(CheckError, match=says) as refused:
        buildah.refuse_unless_possible(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_engine_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def put(folder: Path, programs: Mapping[str, int]) -> None:
        for name, status in programs.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\nexit {status}\n")
            path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker.find() is None
    put(tmp_path, {"docker": 1})
    assert docker.find() is None
    put(tmp_path, {"podman": 0})
    assert docker.find() == "podman"
