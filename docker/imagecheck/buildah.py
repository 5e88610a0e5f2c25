"""Debian's buildah and a base made by debootstrap: no daemon, no registry of images, no storage but the work folder's."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import base
from .commands import logged, output
from .engine import Container, ImageConfig, Layer, RunSpec
from .errors import CheckError
from .pip_access import PipAccess
from .sandbox import Sandbox

PROGRAMS = ("buildah", "debootstrap", "unshare", "nsenter")
NEEDED_GB = 12.0  # seen: 2 with torch's CPU build; the CUDA build's layer alone has 5.6, and its wheels are unpacked beside it
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # linux/sched.h; os.unshare comes with Python 3.12
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h
PIP_CONFIG = "/etc/pip.conf"


def refuse_unless_possible(work: Path) -> None:
    """Raise, in one sentence, when this machine cannot build this way."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        what = ", ".join(missing)
        raise CheckError(f"no container engine answers, and without one {what} must be there: apt-get install buildah debootstrap")
    if os.geteuid() != 0:
        raise CheckError("building with buildah and debootstrap needs root: run this as root, or start docker or podman")
    free_gb = shutil.disk_usage(work).free / 1e9
    if free_gb < NEEDED_GB:
        raise CheckError(f"building needs {NEEDED_GB:g} GB free in {work.parent} and there are {free_gb:.1f}: free some or set TMPDIR")


def storage_driver(work: Path) -> str:
    """Of images: overlay where this kernel and file system have it, for vfs, which works everywhere, copies all for each layer."""
    if chosen := os.environ.get("STORAGE_DRIVER"):  # buildah's own variable
        return chosen
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        below, above, here, merged = (Path(scratch, name) for name in ("lower", "upper", "work", "merged"))
        for folder in (below, above, here, merged):
            folder.mkdir()
        options = f"lowerdir={below},upperdir={above},workdir={here}"
        if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], capture_output=True).returncode:
            return "vfs"
        output(["umount", merged])
    return "overlay"


def own_namespace(kind: int) -> None:
    """From here on this process and its children have mounts, or a network, of their own; the kernel removes them at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(kind):
        raise CheckError(f"the kernel refuses a namespace: {os.strerror(ctypes.get_errno())}")


def bring_up_loopback() -> None:
    """In a network of one's own even this interface is down at first."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


class Buildah:
    """Has to be made before any thread is started: namespaces belong to threads."""

    name = "buildah"
    shares_ports = False

    def __init__(self, work: Path, pip: PipAccess, bases: Sequence[str]) -> None:
        refuse_unless_possible(work)
        self._work = work
        self._roots: dict[str, tuple[str, Path]] = {}  # tag -> container, its file system
        self._running: list[Sandbox] = []
        # Whatever ends this process, nothing stays mounted.
        own_namespace(CLONE_NEWNS)
        output(["mount", "--make-rprivate", "/"])
        self._driver = storage_driver(work)
        self._pip_mounts = self._make_pip_mounts(pip)
        for image in bases:
            if image not in self._call("images", "--format", "{{.Name}}:{{.Tag}}"):
                base.commit(self._call, base.make_root(work, image), image)

    def _command(self, *arguments: str | Path) -> list[str | Path]:
        return ["buildah", "--root", self._work / "storage", "--runroot", self._work / "run", "--storage-driver", self._driver, *arguments]

    def _call(self, *arguments: str | Path) -> str:
        return output(self._command(*arguments))

    def _make_pip_mounts(self, pip: PipAccess) -> list[str]:
        config = self._work / "pip.conf"
        config.write_text(pip.config)
        return [f"--volume={config}:{PIP_CONFIG}:ro", *(f"--volume={path}:{path}:ro" for path in pip.paths)]

    def build(self, dockerfile: Path, context: Path, tag: str) -> None:
        # Docker's format, for the other one drops HEALTHCHECK.
        options = ["--format=docker", "--isolation=chroot", "--pull-never", "--network=host", *self._pip_mounts]
        options += ["--layers"] * (self._driver != "vfs")  # else one layer: comparing whole copies takes longer than the build
        command = self._command("bud", *options, f"--file={dockerfile}", f"--tag={tag}", context)
        logged(f"building {tag}", command, self._work / f"build-{dockerfile.name}.log")

    def _inspect(self, tag: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._call("inspect", "--type", "image", tag))["Docker"]
        return found

    def config(self, tag: str) -> ImageConfig:
        return ImageConfig.of(self._inspect(tag)["config"])

    def layers(self, tag: str) -> list[Layer]:
        storage = self._work / "storage"
        known = {layer["id"]: layer for layer in json.loads((storage / f"{self._driver}-layers/layers.json").read_text())}
        images = json.loads((storage / f"{self._driver}-images/images.json").read_text())
        top = next(image["layer"] for image in images if f"localhost/{tag}" in image.get("names", ()))
        sizes: list[int] = []
        while top:
            sizes.insert(0, known[top].get("diff-size", 0))
            top = known[top].get("parent")
        history = [entry.get("created_by", "") for entry in self._inspect(tag)["history"] if not entry.get("empty_layer")]
        if len(history) != len(sizes):  # built without layers
            history = ["the base image", *["all instructions"] * (len(sizes) - 1)]
        return [Layer(instruction, size) for instruction, size in zip(history, sizes, strict=True)]

    def _root(self, tag: str) -> tuple[str, Path]:
        """One file system for all containers of an image: none of them can write to it."""
        if tag not in self._roots:
            container = self._call("from", "--pull-never", tag).strip()
            self._roots[tag] = container, Path(self._call("mount", container).strip())
        return self._roots[tag]

    def start(self, spec: RunSpec) -> Container:
        config, (_, root) = self.config(spec.image), self._root(spec.image)
        volumes: dict[str, Path] = {}
        for volume in spec.volumes:
            path = volume.partition(":")[2] or volume
            volumes[path] = folder = self._work / "volumes" / spec.name / path.strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            owner = (root / path.strip("/")).stat()
            os.chown(folder, owner.st_uid, owner.st_gid)
        self._running.append(Sandbox(spec, config, root, volumes, self._work / f"{spec.name}.log"))
        return self._running[-1]

    def once(self, tag: str, script: str, out: Path) -> None:
        container, _ = self._root(tag)
        options = ["--isolation=chroot", "--network=host", "--user=0:0", *self._pip_mounts, f"--volume={out}:/out"]
        logged(f"a tool in {tag}", self._command("run", *options, container, "--", "sh", "-euc", script), self._work / "tool.log")

    def close(self) -> None:
        for sandbox in self._running:
            sandbox.kill()
        for container, _ in self._roots.values():
            subprocess.run([str(part) for part in self._command("rm", container)], capture_output=True)


def unmount_below(folder: Path) -> None:
    """Whatever is mounted inside of a folder, last first: it is about to be removed."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([point for point in points if point.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", point], capture_output=True)
