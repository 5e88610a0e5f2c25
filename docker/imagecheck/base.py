"""A stand-in for the Python base image, made of Debian packages, for machines that reach no registry of images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from .commands import logged
from .errors import CheckError

# The Debian release whose python3 is the Dockerfile's minor version: wheels are chosen by it.
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the Python image's: debootstrap gives none


def image_name(dockerfile: Path) -> str:
    """The base that a Dockerfile builds on."""
    (name,) = re.findall(r"^FROM (\S+)", dockerfile.read_text(), re.M)
    return str(name)


def suite(image: str) -> str:
    """The Debian release for a name such as ``python:3.11.14-slim-trixie``."""
    match = re.fullmatch(r"(?:.*/)?python:(\d+\.\d+)\.\d+-slim.*", image)
    if not match or match[1] not in SUITES:
        known = ", ".join(f"{version} ({name})" for version, name in SUITES.items())
        raise CheckError(f"there is no stand-in for the base image {image}: it would have to be a slim Python of {known}")
    return SUITES[match[1]]


def make_root(folder: Path, image: str) -> Path:
    """The base's file system in a folder of ``folder``; one that is complete is used again."""
    name = suite(image)
    root, done = folder / name, folder / f"{name}.done"
    if done.exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    logged("debootstrap", ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", name, root], folder / "debootstrap.log")
    # What the Python image has and Debian does not: the name python, and pip that installs without a virtual environment.
    (root / "usr/bin/python").symlink_to("python3")
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    for cache in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / cache, ignore_errors=True)
    done.touch()
    return root


def commit(buildah: Callable[..., str], root: Path, image: str) -> None:
    """Make an image of it under the base image's own name, so that the Dockerfiles stay as they are."""
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, root, "/")
    buildah("config", "--env", f"PATH={PATH}", container)
    full = image if "/" in image else f"docker.io/library/{image}"
    buildah("commit", "--quiet", "--format", "docker", "--rm", container, full)
