"""Fault tests: a quick subset always, all of it with ``make faults``, which sets LATENTLINE_FAULTS_JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.collector import Collector, collecting
from support.receiver import Receiver
from support.tiny import tiny_pipeline
from support.tiny_families import TINY

from latentline.errors import MissingExtra
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.store import Store

OUT = os.environ.get("LATENTLINE_FAULTS_JSON")
_rows: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether all of it runs, at its full counts."""
    return OUT is not None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    # 16x16 latents at the smallest size that jobs may ask for: these tests are about faults, not about arithmetic.
    tiny_pipeline(vae_scale_factor=4).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def flow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of flow matching, with two guidance branches."""
    folder = tmp_path_factory.mktemp("models") / "flow"
    TINY["sd3"]().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Store]]:
    folder = tmp_path_factory.mktemp("services")
    broker, store = Broker(folder / "broker", "secret"), Store(folder / "store", "k" * 20, "s" * 40)
    try:
        broker.start()
        store.start()
    except MissingExtra as error:
        broker.stop()
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    yield broker, store
    store.stop()
    broker.stop()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, services: tuple[Broker, Store], tmp_path: Path) -> Iterator[Cluster]:
    """Of the tiny model, or of the model whose fixture a test names (``support.cluster.EACH_MODEL``)."""
    running = Cluster(tmp_path, *services, request.getfixturevalue(getattr(request, "param", "tiny_model")))
    yield running
    running.close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where the processes that a test starts send their spans."""
    with collecting() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Put figures into this fault's row of the report."""

    def put(fault: str, **figures: Any) -> None:
        _rows.setdefault(request.node.nodeid, {"fault": fault}).update(figures)

    return put


FULL_TIMEOUT_S = 3600  # of one test at full counts; what waits in it has its own patience

QUICK = (
    "test_a_killed_workers_jobs",
    "test_only_the_guilty_job_dies[error",
    "test_the_picture_of_a_resumed_job",
    "test_lost_messages",
    "test_scripts_that_the_broker_forgets",
    "test_the_same_message_three_times",
    "costs_a_retry_and_no_denoising[http500",
    "test_every_job_is_told_once",
    "test_upgrading_one_process_at_a_time[API first",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``make faults`` only the quick ones: the others take minutes each or judge times."""
    if OUT:
        for item in items:
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT_S))
        return
    here = [item for item in items if "tests/faults/" in item.nodeid]
    left_out = [item for item in here if not any(name in item.nodeid for name in QUICK)]
    if left_out and len(here) > 1:  # one that is asked for by name runs
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" and "tests/faults/" in item.nodeid:
        _rows.setdefault(item.nodeid, {"fault": item.name})  # one that failed before it had figures
        _rows[item.nodeid] |= {"pass": report.passed, "took_s": round(report.duration, 1)}
        write_report()  # after each row: what was seen is kept, also when the run is cut short
    return report


def write_report() -> None:
    if OUT:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        report = {"date": datetime.date.today().isoformat(), "machine": machine, "faults": list(_rows.values())}
        Path(OUT).write_text(json.dumps(report, indent=2) + "\n")
