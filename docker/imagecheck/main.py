"""Build both images and run them as deploy/ says, on this machine; ``make images``.

Docker or Podman is used where one answers. Elsewhere, as root, Debian's buildah with a base image that debootstrap makes.
Writes figures, bills of materials and lists of licences. Exit status 0: everything was as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentline.errors import ConfigurationError

from . import bill, docker
from .base import image_name
from .buildah import CLONE_NEWNET, Buildah, bring_up_loopback, own_namespace, unmount_below
from .deploy import PORT, Deploy, dockerfiles
from .engine import Engine
from .errors import CheckError
from .pip_access import machine_pip
from .services import Services
from .trial import Trial

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = dockerfiles(ROOT)


def say(text: str) -> None:
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", flush=True)


def choose(work: Path, wanted: str | None) -> Engine:
    pip = machine_pip()
    program = wanted or docker.find() or "buildah"
    if program != "buildah":
        return docker.Docker(program, work, pip)
    return Buildah(work, pip, sorted(set(map(image_name, DOCKERFILES.values()))))


def build(engine: Engine, tag: str, figures: dict[str, Any], out: Path) -> None:
    """One image: built, weighed, and its bill of materials written."""
    started = time.monotonic()
    engine.build(DOCKERFILES[tag], ROOT, tag)
    seconds = round(time.monotonic() - started)
    layers = engine.layers(tag)
    figures[tag] = {
        "build_s": seconds,
        "mb": round(sum(layer.num_bytes for layer in layers) / 1e6),
        "layers": [{"mb": round(layer.num_bytes / 1e6, 1), "instruction": " ".join(layer.instruction.split())} for layer in layers],
        "licenses": bill.write(engine, tag, out),
    }
    say(f"{tag}: built in {seconds} s, {figures[tag]['mb']} MB")
    for layer in figures[tag]["layers"]:
        print(f"    {layer['mb']:8.1f} MB  {layer['instruction'][:100]}", flush=True)


def make_room(engine: Engine) -> None:
    """For the API's port."""
    if not engine.shares_ports:
        # Nobody else sees these services, nobody else's ports are in the way, and nothing is reached but loopback.
        own_namespace(CLONE_NEWNET)
        bring_up_loopback()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", PORT))
        except OSError:
            raise CheckError(f"port {PORT} of this machine is in use: the API's container needs it") from None


def check(work: Path, out: Path, wanted: str | None) -> None:
    started = time.monotonic()
    figures: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": platform.machine(), "cores": os.cpu_count()}
    engine = choose(work, wanted)
    services = None
    try:
        figures |= {"engine": engine.name, "base_s": round(time.monotonic() - started)}
        say(f"images are built with {engine.name}")
        for tag in DOCKERFILES:
            build(engine, tag, figures, out)
        make_room(engine)
        services = Services(ROOT / "deploy/valkey", work / "services")
        services.start()
        trial = Trial(engine, Deploy(ROOT, services.variables(), services.addresses()), services, say)
        trial.run()
        figures |= {"trial": trial.figures, "total_s": round(time.monotonic() - started)}
    finally:
        engine.close()
        if services:
            services.stop()
    (out / "images.json").write_text(json.dumps(figures, indent=2) + "\n")
    say(f"all as it should be, in {figures['total_s']} s; figures, bills of materials and licences: {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), help="default: the first of these that answers")
    parser.add_argument("--out", type=Path, default=ROOT / "out/images", help="folder for what is written (default: out/images)")
    parser.add_argument("--work", type=Path, help="folder that keeps base image and layers for the next run (default: none is kept)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the same way out as an error
    work = options.work
    try:
        # Not /tmp, which often lies in memory.
        work = work or Path(tempfile.mkdtemp(prefix="latentline-images-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / "services", ignore_errors=True)
        check(work.resolve(), options.out.resolve(), options.engine)
    except (CheckError, ConfigurationError, OSError) as error:
        print(f"docker/check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if work and not options.work:
            unmount_below(work)
            shutil.rmtree(work, ignore_errors=True)
    return 0
