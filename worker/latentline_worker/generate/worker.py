"""The process that generates images, as an object: what it consists of, and the order in which its parts start and stop."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.signals import worker_ready, worker_shutting_down

from latentline.exporter import serve_metrics
from latentline.records import Records
from latentline.routing import GENERATE_TASK, queue_names
from latentline_worker.engine.engine import Engine
from latentline_worker.images.store import ImageStore
from latentline_worker.images.upload import Uploader
from latentline_worker.maintenance.deadlines import Deadlines
from latentline_worker.maintenance.expiry import Expiry
from latentline_worker.maintenance.liveness import LivenessFile
from latentline_worker.maintenance.reaper import Reaper
from latentline_worker.maintenance.upkeep import Upkeep
from latentline_worker.settings import WorkerSettings
from latentline_worker.transport.app import LOGS, NO_GOSSIP, create_app

from .announcer import Announcer
from .leases import Leases
from .metrics import EngineMetrics, JobMetrics
from .rescans import Rescans
from .roster import Roster
from .runner import JobRunner
from .signals import Signals
from .swapper import Loader, Swapper
from .watchdog import Watchdog
from .working import WorkingNow

if TYPE_CHECKING:
    from latentline.tracing.export import Traces

log = logging.getLogger(__name__)


class GenerateWorker:
    """One worker process around loaded models: takes wake-ups through Celery until SIGTERM, then drains.

    :meth:`run` does all of it. :meth:`start`, :meth:`drain` and :meth:`stop` are its stages: Celery calls the first when
    it takes messages, the second on SIGTERM, and returns from its loop when no task is left.

    Args:
        name: of this worker, in records and logs.
        roster: the models; those in memory are the engine's.
        engine: warmed up, not started.
        store: where images go; its bucket exists.
        loader: loads models again; needed where not all of them are in memory.
        metrics_offset: added to ``LATENTLINE_METRICS_PORT``: the worker's number on this machine.
        traces: where spans of attempts go; None makes none.
    """

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        roster: Roster,
        engine: Engine,
        records: Records,
        store: ImageStore,
        loader: Loader | None = None,
        metrics_offset: int = 0,
        traces: Traces | None = None,
    ) -> None:
        self._traces = traces
        self._metrics_offset = metrics_offset
        self._name, self._settings, self._engine, self._records, self._roster = name, settings, engine, records, roster
        self._liveness = LivenessFile(settings.ready_file)
        metrics = JobMetrics()
        self._reaper = Reaper(records, roster.ids, settings.lease_s)
        self._leases = Leases(
            records,
            settings.lease_s,
            engine_stalled=self.engine_stalled,
            touch_liveness_file=self._liveness.touch,
            broker_lost=self._reaper.broker_lost,
            checkpoint_schedule=engine.checkpoint_schedule,
            metrics=metrics,
        )
        self._signals = Signals(records, name, self._leases)
        self._watchdog = Watchdog(self.engine_stalled, self._leases.uploads_left, self.abort)
        working = WorkingNow(engine, self._leases.num_held, settings.concurrency)
        self._swapper = Swapper(records, name, roster, engine, loader) if loader and not roster.all_fit else None
        self._announcer = Announcer(records, name, roster, working, self._swapper.hear if self._swapper else self._hear)
        self._rescans = Rescans(roster)
        self._upkeep = Upkeep(records, name, roster.ids, self._reaper, Deadlines(records))
        self._expiry = Expiry(records, name, store)
        self._runner = JobRunner(
            name,
            roster,
            records,
            engine,
            Uploader(store),
            self._leases,
            settings.lease_s,
            engine_stalled=self.engine_stalled,
            metrics=metrics,
            tracer=traces.tracer if traces else None,
        )
        metrics.registry.register(EngineMetrics(engine, self._leases.num_held, settings.concurrency, lambda: roster.said().swaps))
        self._metrics = metrics

    def run(self) -> int:
        """Take work until SIGTERM, then drain and stop; the exit status of the process.

        Raises:
            BrokerUnavailable: the broker does not answer at the start.
            ConfigurationError: the port for metrics is taken.
        """
        for problem in self._records.durability():
            log.warning("broker: %s", problem)
        serve_metrics(self._settings, self._metrics.registry, offset=self._metrics_offset)
        self._engine.start()
        worker_ready.connect(self._on_ready, weak=False)
        worker_shutting_down.connect(self._on_shutting_down, weak=False)
        consumer = self._consumer(self._app())
        consumer.start()  # returns when Celery has stopped and its tasks have ended
        self.stop()
        return int(consumer.exitcode or 0)

    def start(self) -> None:
        """Celery takes messages now: renew leases, watch the engine, announce the worker, do maintenance.

        Leases and the watchdog come first: Celery logs an error of this method and takes messages all the same.
        """
        self._leases.start()
        self._watchdog.start()
        self._signals.start()
        self._announcer.start()
        self._upkeep.start()
        self._expiry.start()
        self._rescans.start()
        if self._swapper:
            self._swapper.start()
        log.info("%s: ready", self._name)

    def drain(self) -> None:
        """Jobs that denoise are checkpointed and continue elsewhere at once; those that upload have ``drain_s`` seconds.

        Celery waits for its tasks without a bound, so the bound is set here: whatever still uploads then is given back to
        the queue, and another worker uploads it.
        """
        if self._swapper:
            self._swapper.stop()
        threading.Thread(target=self._engine.stop, name="drain", daemon=True).start()
        timer = threading.Timer(self._settings.drain_s, self._end_now)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """Shut down in data-flow order: Celery takes nothing any more; then the engine, maintenance, leases, announcement."""
        if self._swapper:
            self._swapper.stop()
        self._rescans.stop()
        self._engine.stop()
        self._expiry.stop()
        self._upkeep.stop()
        self._watchdog.stop()
        self._signals.stop()
        self._leases.stop()
        self._announcer.stop()
        self._liveness.remove()
        self._close_traces()

    def engine_stalled(self) -> bool:
        """Whether the engine has failed, or has finished nothing for ``stall_s`` seconds although it has work."""
        return self._engine.stalled_for() > self._settings.stall_s

    def abort(self) -> None:
        """End the process at once with status 70, for its supervisor to start another.

        The engine's thread hangs in a call that nothing interrupts, or has ended by an error; threads that wait for it
        would keep an orderly exit waiting for ever.
        """
        stalled_s = self._engine.stalled_for()
        what = f"has finished nothing for {stalled_s:.0f} s" if math.isfinite(stalled_s) else "has failed"
        log.critical("%s: the engine %s: this process ends", self._name, what)
        self._liveness.remove()
        self._close_traces()
        os._exit(os.EX_SOFTWARE)

    def _app(self) -> Celery:
        app = create_app(self._settings, self._queues(), self._records, self._settings.concurrency, attention=self._roster.attention)
        app.task(self._runner.run, name=GENERATE_TASK, shared=False)
        return app

    def _consumer(self, app: Celery) -> Any:
        return app.Worker(
            hostname=self._name,
            pool="threads",
            # One shard, so one tenant, gets half of the threads at most: another tenant's jobs need not wait for it.
            concurrency=2 * self._settings.concurrency,
            queues=self._queues(),
            **LOGS,
            **NO_GOSSIP,
        )

    def _queues(self) -> list[str]:
        return [queue for model in self._roster.ids for queue in queue_names(model, self._records.level)]

    def _hear(self, waits: Mapping[str, float]) -> None:
        self._roster.attention.busy(waits.keys())

    def _end_now(self) -> None:
        try:
            self._leases.release_all()
            self._close_traces()
        finally:
            os._exit(0)  # whatever went wrong: nothing else ends the process while a task is left

    def _close_traces(self) -> None:
        if self._traces:
            self._traces.close()

    def _on_ready(self, **_: object) -> None:
        self.start()

    def _on_shutting_down(self, **_: object) -> None:
        self.drain()
