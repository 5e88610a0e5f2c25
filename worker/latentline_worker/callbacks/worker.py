"""``latentline callbacks serve``: the process that delivers callbacks, a Celery worker with no model and no GPU."""

from __future__ import annotations

import os
import socket

from celery.signals import worker_ready

from latentline.connection import connect
from latentline.exporter import serve_metrics
from latentline.logs import set_up_logs
from latentline.records import Records
from latentline.routing import CALLBACK_QUEUE, CALLBACK_TASK, CALLBACK_UNACKED
from latentline.tracing import open_traces
from latentline_worker.maintenance.callback_wakes import CallbackWakes
from latentline_worker.maintenance.liveness import LivenessFile
from latentline_worker.settings import ProcessSettings
from latentline_worker.transport.app import LOGS, NO_GOSSIP, create_app

from .deliverer import Deliverer
from .message import Links
from .metrics import CallbackMetrics

CONCURRENCY = 16  # concurrent tries of one process


def serve(settings: ProcessSettings) -> int:
    """Deliver callbacks until SIGTERM; the exit status of the process.

    Raises:
        ConfigurationError: a secret is malformed, or the port for metrics is taken.
    """
    name = f"callbacks@{socket.gethostname()}"
    set_up_logs(settings.log_format, name)
    records = Records(connect(settings.redis_url.get_secret_value()), settings.retention_s)
    secrets = settings.callback_secret.get_secret_value().split(",") if settings.callback_secret else []
    metrics = CallbackMetrics()
    serve_metrics(settings, metrics.registry)
    common = [one.strip() for one in secrets if one.strip()]
    traces = open_traces("callbacks", f"{name}:{os.getpid()}")
    tracer = traces.tracer if traces else None
    deliverer = Deliverer(records, common, settings.callback_rule, links=Links.of(settings), metrics=metrics, tracer=tracer)
    app = create_app(settings, [CALLBACK_QUEUE], records, CONCURRENCY, CALLBACK_UNACKED)
    app.task(deliverer.deliver, name=CALLBACK_TASK, shared=False)
    wakes, liveness = CallbackWakes(records, name), LivenessFile(settings.ready_file)

    def on_ready(**_: object) -> None:
        wakes.start()
        liveness.start()

    worker_ready.connect(on_ready, weak=False)
    worker = app.Worker(hostname=name, pool="threads", concurrency=CONCURRENCY, queues=[CALLBACK_QUEUE], **LOGS, **NO_GOSSIP)
    worker.start()
    wakes.stop()
    liveness.stop(wait_s=1.0)  # a touch after the removal would bring the file back
    liveness.remove()
    if traces:
        traces.close()
    return int(worker.exitcode or 0)
