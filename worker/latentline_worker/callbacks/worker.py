"""``latentline callbacks serve``: the process that delivers callbacks. A Celery worker with no model and no GPU."""

from __future__ import annotations

import logging
import socket
import threading

from celery.signals import worker_ready

from latentline.connection import connect
from latentline.errors import LatentlineError
from latentline.records import Records
from latentline.routing import CALLBACK_QUEUE, CALLBACK_TASK, CALLBACK_UNACKED
from latentline_worker.settings import ProcessSettings
from latentline_worker.transport.app import LONELY, create_app

from .deliverer import Deliverer

log = logging.getLogger(__name__)

CONCURRENCY = 16  # tries at a time in one process
TEND_EVERY_S = 1.0


def serve(settings: ProcessSettings) -> int:
    """Deliver callbacks until SIGTERM: a Celery worker of its own queue, with no model and no GPU."""
    records = Records(connect(settings.redis_url.get_secret_value()), settings.retention_s)
    secret = settings.callback_secret.get_secret_value() if settings.callback_secret else ""
    deliverer = Deliverer(records, [one.strip() for one in secret.split(",") if one.strip()], settings.callback_networks)
    app = create_app(settings, [CALLBACK_QUEUE], records, CONCURRENCY, CALLBACK_UNACKED)
    app.task(deliverer.deliver, name=CALLBACK_TASK)
    stopped = threading.Event()

    def tend() -> None:
        while not stopped.wait(TEND_EVERY_S):
            try:
                if settings.ready_file:
                    settings.ready_file.touch()
                records.wake_callbacks()
            except LatentlineError as error:
                log.warning("callbacks: %s", error.message)
            except Exception:
                log.exception("tending callbacks failed")

    worker_ready.connect(lambda **_: threading.Thread(target=tend, name="tend", daemon=True).start(), weak=False)
    name = f"callbacks@{socket.gethostname()}"
    worker = app.Worker(hostname=name, pool="threads", concurrency=CONCURRENCY, queues=[CALLBACK_QUEUE], loglevel="INFO", **LONELY)
    worker.start()
    stopped.set()
    if settings.ready_file:
        settings.ready_file.unlink(missing_ok=True)
    return int(worker.exitcode or 0)
