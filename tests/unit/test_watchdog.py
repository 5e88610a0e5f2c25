"""A device call that never returns ends the process, whatever else waits behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest
from support.cluster import THIS_CODE
from support.stubs import PATIENCE_S

from latentline import records
from latentline.jobs import JobRequest, Phase, resolve
from latentline.records import Records
from latentline_worker.generate.leases import Leases
from latentline_worker.generate.watchdog import Watchdog


def watchdog(stalled: bool, uploads: bool) -> list[bool]:
    aborted: list[bool] = []
    Watchdog(lambda: stalled, lambda: uploads, lambda: aborted.append(True)).run_once()
    return aborted


@pytest.mark.parametrize(("stalled", "uploads", "aborts"), [(False, False, 0), (False, True, 0), (True, True, 0), (True, False, 1)])
def test_it_aborts_a_stalled_engine_once_nothing_uploads_any_more(stalled: bool, uploads: bool, aborts: int) -> None:
    assert len(watchdog(stalled, uploads)) == aborts


class OnDevice:
    """A request of which every tensor lies on a device that hangs: reading one never returns."""

    def __init__(self) -> None:
        self.step, self.num_steps, self.batch_jobs, self.phase, self.preview, self.work = 1, 20, 1, Phase.DENOISING, None, None
        self.checkpoint = self
        self.reading, self.returns = threading.Event(), threading.Event()

    def to_bytes(self, _: object) -> None:
        self.reading.set()
        self.returns.wait(PATIENCE_S)

    def cancel(self, reason: str) -> None: ...


def test_it_does_not_wait_for_a_thread_that_waits_for_the_device() -> None:
    client = fakeredis.FakeRedis(decode_responses=True)
    store = Records(client)
    job = records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600))[0]
    claim = store.claim(job.id, "w", 30)
    assert claim is not None
    stalled, aborted = threading.Event(), threading.Event()
    leases = Leases(store, lease_s=30, engine_stalled=stalled.is_set)
    dog = Watchdog(stalled.is_set, leases.uploads_left, aborted.set)
    with leases.hold(claim) as leased:
        leased.attach(cast(Any, request := OnDevice()))
        leases.start()
        dog.start()
        assert request.reading.wait(PATIENCE_S)  # the thread that renews leases stands behind the device
        stalled.set()
        try:
            assert aborted.wait(PATIENCE_S)
        finally:
            request.returns.set()
            dog.stop(PATIENCE_S)
            leases.stop()


WEDGED_PROCESS = """
import sys, threading
from pathlib import Path
from typing import Any

import fakeredis
from support.stubs import FAMILY, MemoryStore, StubEngine

from latentline import records
from latentline.jobs import JobRequest, resolve
from latentline.records import Records
from latentline_worker.engine.request import Request, Work
from latentline_worker.generate.roster import Roster
from latentline_worker.generate.worker import GenerateWorker
from latentline_worker.settings import WorkerSettings


class WedgedEngine(StubEngine):
    '''Its thread enters a device call that never returns; what it holds of a request lies behind that call.'''

    def submit(self, work: Work) -> Request:
        entered = threading.Event()

        def device_call() -> None:
            entered.set()
            threading.Event().wait()

        class Checkpoint:
            step = 1

            def to_bytes(self, work: Work) -> bytes:
                threading.Event().wait()

        threading.Thread(target=device_call, name="engine").start()  # no daemon thread: an orderly exit would wait for it
        entered.wait()
        request = Request(work)
        request.step, request.checkpoint = 1, Checkpoint()
        self.stalled_s = 10.0
        return request


client = fakeredis.FakeRedis(decode_responses=True)
store = Records(client)
(job,) = records.run(client, records.submit([resolve(JobRequest.parse({"prompt": "a cat", "scheduler": "ddim"}))], 600))
settings = WorkerSettings(stall_s=5, ready_file=Path(sys.argv[1]))
worker = GenerateWorker("cpu@test", settings, Roster.of([FAMILY]), WedgedEngine(), store, MemoryStore())
worker.start()
worker._runner.run(job.id)
"""


def test_a_device_call_that_never_returns_ends_the_process_with_status_70(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WEDGED_PROCESS, str(tmp_path / "ready")],
        env={**os.environ, "PYTHONPATH": THIS_CODE.path},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert ended.returncode == os.EX_SOFTWARE, ended.stderr
