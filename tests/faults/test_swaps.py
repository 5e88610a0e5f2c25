"""Workers with more models than fit that are killed while they exchange them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.cluster import Cluster

from latentline_worker.models import catalog, weights
from latentline_worker.models.catalog import ModelEntry

NAMES = ("a", "b", "c")


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path) -> Path:
    """A file of three models of which one fits: while it is exchanged, the worker waits at no queue."""
    size = weights.of_files(ModelEntry(source=str(tiny_model)), torch.float32)
    path = tmp_path / "models.toml"
    path.write_text(f"weights_mb = {1.5 * size / 2**20}\ncold_wait_s = 0.5\n")
    for name in NAMES:
        catalog.append(path, ModelEntry(source=str(tiny_model), id=name))
    return path


def swapping(log: Path) -> bool:
    said = log.read_text(errors="replace")
    return said.count(": it is loaded in the place of") > said.count(" is in memory after ")


def test_a_worker_killed_in_the_middle_of_a_swap_loses_nothing(
    cluster: Cluster, models: Path, full: bool, figure: Callable[..., None]
) -> None:
    """kill -9 while one model leaves or another is read; the worker that comes next does what is left."""
    kills = 20 if full else 1
    rng = random.Random(0)
    env = {"LATENTLINE_MODELS": str(models), "FAULT_LOAD_S": "1"}
    worker = cluster.start_worker(**env)
    in_flight = 0
    for _ in range(kills):
        for name in NAMES:
            cluster.submit(4, model=name, num_inference_steps=30)
        cluster.until(partial(swapping, worker.log))
        if full:
            time.sleep(rng.uniform(0, 1.5))  # in the middle of leaving or of loading
        in_flight += len(cluster.running(step=0))
        cluster.kill(worker)
        worker.process.wait(60)
        worker = cluster.start_worker(**env)
    cluster.finish(timeout_s=300)
    ended = cluster.check_invariants()
    swaps = sum(child.log.read_text(errors="replace").count(" is in memory after ") for child in cluster.children)
    figure("kill -9 in the middle of a swap", kills=kills, jobs=len(cluster.accepted), in_flight=in_flight, swaps_done=swaps, ended=ended)
    assert swaps >= 1
