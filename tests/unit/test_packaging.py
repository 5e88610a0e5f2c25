"""What is installed, and how: light imports, one install line everywhere, one version, a CI run that ends in the tests."""

import os
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
HEAVY = {"torch", "diffusers", "transformers", "celery", "kombu", "latentline_worker"}
INSTALL = re.compile(r"python -m pip install -e '\.\[([\w$(),]+)\]' -c constraints\.txt")


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    found = [Requirement(r) for r in [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]  # an extra may hold another


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize(
    "module", ["latentline", "latentline.client", "latentline.async_client", "latentline.webhooks", "latentline.cli", "latentline.testing"]
)
def test_producer_imports_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


PUBLIC = {
    "AsyncClient", "BrokerUnavailable", "Callback", "Client", "ConfigurationError", "IdempotencyConflict", "ImageRef",
    "InvalidRequest", "JobError", "JobEvent", "JobFailed", "JobFilter", "JobNotEnded", "JobNotFound", "JobRecord", "JobRequest",
    "JobWarning", "LatentlineError", "ModelInfo",
    "NoWorker", "Outcome", "Output", "Phase", "ResolvedRequest", "ServedModel", "ServiceUnavailable", "Settings", "Status",
    "StoreUnavailable",
    "TenantQuotaExceeded", "WaitTimeout", "__version__",
}  # fmt: skip


def test_the_public_names_are_those_that_the_package_exports() -> None:
    """Taking one away, or adding one, is a decision: it changes this list."""
    import latentline

    assert set(latentline.__all__) == PUBLIC and list(latentline.__all__) == sorted(latentline.__all__)
    for name in PUBLIC:
        assert getattr(latentline, name) is not None
    star: dict[str, object] = {}
    exec("from latentline import *", star)
    assert star.keys() >= PUBLIC
    with pytest.raises(AttributeError, match="no_such_name"):
        latentline.no_such_name  # noqa: B018


def test_every_error_that_a_client_raises_is_public() -> None:
    """Those that no client raises belong to workers, receivers of callbacks and commands."""
    import latentline
    from latentline import errors

    inner = {
        "KeyNotFound", "MissingExtra", "ModelError", "NotAllowed", "NotAuthenticated", "NumericalError", "OutOfMemory", "PictureNotFound",
        "RateExceeded", "SecretNotFound", "StaleToken", "TooManyStreams", "WebhookError",
    }  # fmt: skip
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LatentlineError)}
    assert kinds == inner | {name for name in latentline.__all__ if name in kinds}


def test_core_dependencies_bring_nothing_heavy() -> None:
    """Walk what the core requires, as installed here, down to the leaves."""
    seen: set[str] = set()
    todo = [canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        needed = [Requirement(r) for r in metadata.requires(name) or []]
        todo += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert seen & {canonicalize_name(name) for name in HEAVY} == set()


def test_version_is_the_same_everywhere() -> None:
    import latentline

    assert metadata.version("latentline") == PROJECT["version"] == latentline.__version__
    for image in re.findall(r"image: latentline-\w+:(\S+)", "".join(f.read_text() for f in (ROOT / "deploy").rglob("*.yaml"))):
        assert image == PROJECT["version"]


def test_every_requirement_is_pinned_within_its_range() -> None:
    known = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(known[canonicalize_name(requirement.name)]), requirement


def test_constraints_name_releases_only() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}: a local suffix or a path is no release"


def test_callbacks_are_delivered_without_torch() -> None:
    """The extra for it is small: nothing that the process imports may need more."""
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}"
    code = f"import latentline_worker.callbacks.worker, sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_makefile_and_dockerfiles_install_alike() -> None:
    for path in ("Makefile", "docker/Dockerfile.api", "docker/Dockerfile.worker"):
        text = (ROOT / path).read_text().replace("$(BIN)/python", "python").replace("$(EXTRAS)", "worker,api,embedded,dev")
        extras_of_one_target = ("[bench]", "[mutants]")
        lines = [line for line in text.splitlines() if "pip install" in line and not any(extra in line for extra in extras_of_one_target)]
        assert len(lines) == 1, f"{path}: one install line"
        match = INSTALL.search(lines[0])
        assert match, f"{path}: {lines[0]}"
        assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert "EXTRAS := worker,api,embedded,dev\n" in (ROOT / "Makefile").read_text()


def test_ci_run_is_executable_and_ends_with_make_test() -> None:
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & stat.S_IXUSR
    lines = run.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == "make test"
    assert subprocess.run(["bash", "-n", run], capture_output=True).returncode == 0


@pytest.mark.parametrize("image", ["api", "worker"])
def test_image_install_points_at_sources_copied_later(image: str, tmp_path: Path) -> None:
    """Run the image's stand-in commands, then the editable build that pip would run: both source roots are in it."""
    for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (run,) = re.findall(r"^RUN (mkdir .+?)\\\n\s+&& python -m pip", (ROOT / f"docker/Dockerfile.{image}").read_text(), re.M | re.S)
    subprocess.run(["sh", "-c", run], cwd=tmp_path, check=True, timeout=60)
    build = "from hatchling.build import build_editable; build_editable('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, timeout=120)
    (path,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (pth,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(pth).decode().split() == [str(tmp_path / "producer"), str(tmp_path / "worker")]


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_sets_up_from_nothing(target: str, tmp_path: Path) -> None:
    """In a folder with only the tracked build files, the install comes before anything from the environment is run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    plan = subprocess.run(["make", "-n", target], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    commands = [line for line in plan.splitlines() if ".venv" in line]
    assert commands[0] == "python3 -m venv .venv"
    assert INSTALL.search(commands[1])


def test_wheel_holds_code_types_and_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = set(wheel.namelist())
    sources = {
        str(file.relative_to(ROOT / root))
        for root in ("producer", "worker")
        for file in (ROOT / root).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sources - held == set()
    assert {"latentline/py.typed", "latentline_worker/training/concepts.csv"} <= held
