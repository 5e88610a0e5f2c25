"""``latentline worker``: one pinned Celery process per visible device.

With several devices a parent, which never imports torch, starts one child per device. Each child is pinned by
``CUDA_VISIBLE_DEVICES`` before it imports torch, loads its models, warms up, and only then takes work. With one device or
none there is no parent.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from latentline.errors import LatentlineError
from latentline.logs import name_process, set_up_logs
from latentline_worker.embedded.orphans import die_with_parent
from latentline_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

# What the parent waits for. Blocked while it does, so that no handler runs between the check and the wait.
LOOK_EVERY_S = 0.2  # at the children, whether a signal has come or not
AWAITED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}


def main(args: Sequence[str]) -> int:
    """Run workers until SIGTERM or SIGINT; 0 if all ended well."""
    parser = argparse.ArgumentParser(prog="latentline worker")
    parser.add_argument("--model", help="the bundled model's id, a diffusers folder, a .safetensors file, or a hub id")
    parser.add_argument("--models", help="a TOML file that names several models")
    parser.add_argument("--concurrency", type=int, help="jobs in flight per process")
    parser.add_argument("--device", help=argparse.SUPPRESS)  # given to children: the index of their one device
    options = parser.parse_args(args)
    given = {"model": options.model, "models": options.models, "concurrency": options.concurrency}
    try:
        settings = WorkerSettings(**{key: value for key, value in given.items() if value is not None})
        set_up_logs(settings.log_format)
        devices = visible_devices()
        if options.device is None and len(devices) > 1:
            return supervise(_start_children(devices, args))
        return _serve(settings, options.device or (devices[0] if devices else None))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        # A rule about several settings names them itself.
        message = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem["loc"] else str(problem["ctx"]["error"])
        print(f"latentline worker: {message}", file=sys.stderr)
    except LatentlineError as error:
        print(f"latentline worker: {error.message}", file=sys.stderr)
    return 1


def visible_devices() -> list[str]:
    """Indices or UUIDs of the GPUs this process may use, found without torch; empty on a machine without any."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [d for d in chosen.split(",") if d.strip() and d.strip() != "-1"]
    try:
        listing = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


def _start_children(devices: Sequence[str], args: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "latentline_worker.generate.launch", *args]
    # A child that outlived this process would hold a device that its successor needs.
    return [
        subprocess.Popen([*command, "--device", d], env={**os.environ, "CUDA_VISIBLE_DEVICES": d}, preexec_fn=die_with_parent())
        for d in devices
    ]


def supervise(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all children; 0 if all ended with 0.

    SIGTERM and SIGINT go to all of them, and when one ends, the others are stopped too, so that no worker runs on half of
    its devices. There are no signal handlers: signals are taken one at a time in the loop below, which is also the only
    place that reaps children.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    told_to_stop = False
    try:
        while True:
            codes = [child.poll() for child in children]
            if None not in codes:
                return int(any(codes))
            stop = any(code is not None for code in codes) and not told_to_stop
            # A child that ends after the poll above leaves its SIGCHLD pending, so the wait returns at once.
            if stop or _next_signal() not in (signal.SIGCHLD, None):
                told_to_stop = True
                for child in children:
                    child.terminate()  # does nothing to a child that has ended
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next_signal() -> int | None:
    """The next awaited signal; None after ``LOOK_EVERY_S``, because another thread of the process may have received it instead."""
    received = signal.sigtimedwait(AWAITED, LOOK_EVERY_S)
    return received.si_signo if received else None


def _serve(settings: WorkerSettings, device_index: str | None) -> int:
    """Load the models onto one device and run their worker until SIGTERM."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device_index or ""  # before torch is imported
    name = f"{'cpu' if device_index is None else f'gpu{device_index}'}@{socket.gethostname()}:{os.getpid()}"
    name_process(name)
    libraries_log_here()

    from latentline.connection import connect
    from latentline.records import Records
    from latentline.tracing import open_traces
    from latentline_worker.images.store import ImageStore
    from latentline_worker.maintenance.liveness import LivenessFile

    from . import loading
    from .worker import GenerateWorker

    LivenessFile(settings.ready_file).remove()  # a container that was restarted still has its old file
    roster, engine, loader = loading.start(settings)
    store = ImageStore(settings)
    store.ensure_bucket()
    records = Records(connect(settings.redis_url.get_secret_value()), settings.retention_s, roster.level)
    log.info("%s: %s loaded and warm", name, ", ".join(model for model in roster.ids if model not in roster.said().cold))
    # The device's index where it is a number: each process of this machine serves its metrics on a port of its own.
    offset = int(device_index) if device_index and device_index.isdigit() else 0
    traces = open_traces("worker", name)
    return GenerateWorker(name, settings, roster, engine, records, store, loader, offset, traces).run()


def libraries_log_here() -> None:
    """Let the libraries of models log as the rest of the process does, instead of through handlers of their own."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_default_handler()
        library.enable_propagation()
        library.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
