"""The signals thread: stops what it is told of, goes on after failures, and stops when it is told to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from latentline.errors import BrokerUnavailable
from latentline.records import Signal, Verdict
from latentline_worker.generate import signals as signals_module
from latentline_worker.generate.signals import Signals

PATIENCE_S = 60  # how long a test waits for a signal before it fails; no test measures time
SIGNAL = Signal("a job", 3, Verdict.CANCEL)


class Broker:
    """Answers each call with what a test puts in, and tells when it is asked."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Signal | Exception | None] = queue.Queue()
        self.asked = threading.Semaphore(0)
        self.workers: set[str] = set()

    def next_signal(self, worker: str, wait_s: float) -> Signal | None:
        self.workers.add(worker)
        self.asked.release()
        answer = self.answers.get(timeout=PATIENCE_S)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Jobs:
    def __init__(self) -> None:
        self.stopped: queue.Queue[Signal] = queue.Queue()

    def stop_job(self, signal: Signal) -> None:
        self.stopped.put(signal)


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def signals(broker: Broker, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Signals]:
    monkeypatch.setattr(signals_module, "PAUSE_S", 0.0)
    made = Signals(broker, "a worker", jobs)  # type: ignore[arg-type]
    made.start()
    yield made
    made.stop()
    broker.answers.put(None)


@pytest.mark.parametrize("before", [None, BrokerUnavailable("away"), RuntimeError("a bug")], ids=["silence", "outage", "bug"])
def test_a_signal_stops_its_job_whatever_came_before(signals: Signals, broker: Broker, jobs: Jobs, before: Exception | None) -> None:
    broker.answers.put(before)
    broker.answers.put(SIGNAL)
    assert jobs.stopped.get(timeout=PATIENCE_S) == SIGNAL
    assert broker.workers == {"a worker"}


def test_nothing_more_is_asked_once_it_is_stopped(signals: Signals, broker: Broker) -> None:
    assert broker.asked.acquire(timeout=PATIENCE_S)
    signals.stop()
    broker.answers.put(None)
    signals._thread.join(PATIENCE_S)
    assert not signals._thread.is_alive() and not broker.asked.acquire(blocking=False)
