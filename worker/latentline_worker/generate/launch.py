"""``latentline worker``: one pinned Celery process per visible device.

The parent never imports torch. Each child is pinned by ``CUDA_VISIBLE_DEVICES`` before it does, loads the model,
warms up, and only then takes work. With one device (or none) there is no parent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from pydantic import ValidationError

from latentline.errors import LatentlineError
from latentline_worker.embedded.orphans import die_with_parent
from latentline_worker.settings import WorkerSettings

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> int:
    """Run workers until they are told to stop; the exit status says whether all ended well."""
    parser = argparse.ArgumentParser(prog="latentline worker")
    parser.add_argument("--model", help="the bundled model's id, a diffusers folder, or a hub id")
    parser.add_argument("--concurrency", type=int, help="jobs in flight per process")
    parser.add_argument("--device", help=argparse.SUPPRESS)  # given to children: the index of their one device
    options = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    given = {"model": options.model, "concurrency": options.concurrency}
    try:
        settings = WorkerSettings(**{key: value for key, value in given.items() if value is not None})
        devices = visible_devices()
        if options.device is None and len(devices) > 1:
            return _supervise(devices, list(args))
        return _serve(settings, options.device or (devices[0] if devices else None))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        print(f"latentline worker: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr)
    except LatentlineError as error:
        print(f"latentline worker: {error.message}", file=sys.stderr)
    return 1


def visible_devices() -> list[str]:
    """Indices or UUIDs of the GPUs this process may use, without importing torch; empty on a CPU machine."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [d for d in chosen.split(",") if d.strip() and d.strip() != "-1"]
    try:
        listing = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


def _supervise(devices: Sequence[str], args: list[str]) -> int:
    """One child per device; a signal goes to all, and when one dies the others are stopped: no half-alive worker."""
    command = [sys.executable, "-m", "latentline_worker.generate.launch", *args]
    # Children that outlived this process would hold the devices that its successor needs.
    children = [
        subprocess.Popen([*command, "--device", d], env={**os.environ, "CUDA_VISIBLE_DEVICES": d}, preexec_fn=die_with_parent())
        for d in devices
    ]

    def stop(*_: object) -> None:
        for child in children:
            if child.poll() is None:
                child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    codes: list[int] = []
    while len(codes) < len(children):
        pid, status = os.wait()
        if any(child.pid == pid for child in children):
            codes.append(os.waitstatus_to_exitcode(status))
            stop()
    return 0 if all(code == 0 for code in codes) else 1


def _serve(settings: WorkerSettings, device_index: str | None) -> int:
    """Load, warm up, take work until SIGTERM; then drain."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device_index or ""  # before torch is imported
    import socket

    from celery.signals import worker_ready, worker_shutting_down

    from latentline.connection import connect
    from latentline.jobs import LEVEL
    from latentline.records import Records
    from latentline.routing import GENERATE_TASK, queue_names
    from latentline_worker.images.store import ImageStore
    from latentline_worker.images.upload import Delivery
    from latentline_worker.maintenance.expiry import Expiry
    from latentline_worker.transport.app import LONELY, create_app

    from .leases import Heartbeat
    from .loading import load_model, make_engine
    from .runner import JobRunner

    name = f"{'cpu' if device_index is None else f'gpu{device_index}'}@{socket.gethostname()}:{os.getpid()}"
    if settings.ready_file:
        settings.ready_file.unlink(missing_ok=True)  # left by a container that was restarted
    family = load_model(settings)
    store = ImageStore(settings)
    store.ensure_bucket()
    records = Records(connect(settings.redis_url.get_secret_value()), settings.retention_s, LEVEL)
    engine = make_engine(settings, family)
    engine.start()
    log.info("%s: %s is loaded and warm", name, family.info.id)
    for problem in records.durability():
        log.warning("broker: %s", problem)

    expiry = Expiry(records, store)

    def announce() -> None:
        records.announce(name, family.info)  # again and again: the broker's state may have been wiped

    def tend() -> None:
        """What belongs to no worker, looked after by every one."""
        # While the broker was away every lease may have run out: each worker has to have the chance to renew its own.
        over = records.reclaim() if records.up_s() > settings.lease_s else []
        for job_id in over:
            log.warning("job %s: its worker is lost, the job is taken from it", job_id)
        for job_id in records.wake(family.info.id, settings.lease_s):
            log.info("job %s: woken again", job_id)

    def pulse() -> None:
        if settings.ready_file:
            settings.ready_file.touch()

    def give_up() -> None:
        # The engine's thread hangs in a call that nothing interrupts, or is gone: only a new process mends that.
        log.critical("%s: the engine has finished nothing for %.0f s: this process ends", name, engine.stalled_for())
        if settings.ready_file:
            settings.ready_file.unlink(missing_ok=True)
        os._exit(os.EX_SOFTWARE)

    heartbeat = Heartbeat(
        records,
        settings.lease_s,
        tend,
        announce,
        stalled_for=engine.stalled_for,
        stall_s=settings.stall_s,
        give_up=give_up,
        pulse=pulse,
        pace=engine.checkpoint_schedule,
    )
    runner = JobRunner(name, family, records, engine, Delivery(store), heartbeat, settings.lease_s, settings.stall_s)
    app = create_app(settings, queue_names(family.info.id, LEVEL), records, settings.concurrency)
    app.task(runner.run, name=GENERATE_TASK)

    def on_ready(**_: object) -> None:
        with contextlib.suppress(LatentlineError):  # again by the heartbeat in any case
            announce()
        heartbeat.start()
        expiry.start()
        log.info("%s: ready", name)

    def end_now() -> None:
        with contextlib.suppress(LatentlineError):
            heartbeat.release_all()
        os._exit(0)

    def on_shutting_down(**_: object) -> None:
        # Jobs that denoise are checkpointed and go on elsewhere at once. Celery waits for the other tasks without a bound,
        # so the bound is here: what still uploads then is given back, and another worker uploads it.
        threading.Thread(target=engine.stop, name="drain", daemon=True).start()
        timer = threading.Timer(settings.drain_s, end_now)
        timer.daemon = True
        timer.start()

    worker_ready.connect(on_ready, weak=False)
    worker_shutting_down.connect(on_shutting_down, weak=False)
    worker = app.Worker(
        hostname=name,
        pool="threads",
        concurrency=2 * settings.concurrency,  # one tenant gets half of it, so that another's jobs need not wait for it
        queues=queue_names(family.info.id, LEVEL),
        loglevel="INFO",
        **LONELY,
    )
    worker.start()
    # In the order of the data's way: nothing enters, the engine ends, what is left is told.
    engine.stop()
    expiry.stop()
    heartbeat.stop()
    with contextlib.suppress(LatentlineError):  # the broker may have gone first
        records.worker_gone(name)
    if settings.ready_file:
        settings.ready_file.unlink(missing_ok=True)
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
