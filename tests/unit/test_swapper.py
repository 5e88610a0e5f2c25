"""Models that take turns on a real engine: nothing is lost, few swaps, and other models' jobs go on while one is loaded."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from support.engines import work
from support.families import OddFamily

from latentline.errors import ModelError
from latentline.routing import level_1_queue, queue_name, queue_names
from latentline_worker.engine.engine import Engine
from latentline_worker.generate.roster import Member, Roster
from latentline_worker.generate.swapper import Swapper

PATIENCE_S = 60
NAMES = ("a", "b", "c")
QUEUES = [queue for name in NAMES for queue in queue_names(name)]
NUM_JOBS = 200
WAIT_S = 15.0  # on the test's clock, on which every job takes a second


class Sized(OddFamily):
    """With weights of four bytes."""

    def __init__(self, model_id: str) -> None:
        super().__init__(model_id)
        self.weights = torch.nn.Linear(1, 1, bias=False)


class Turns:
    """Records of which this needs one call."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, float]] = []
        self.given = True

    def take_turn(self, duties: str, worker: str, life_s: float) -> bool:
        self.taken.append((duties, life_s))
        return self.given


class Files:
    """A loader that waits where a test tells it to."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.problem: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.begun = threading.Event()

    def check(self, model: str) -> None:
        if self.problem:
            raise self.problem

    def load(self, model: str) -> Any:
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)
        self.loaded.append(model)
        return Sized(model)


class Bench:
    """Three models of which two fit, on a real engine; ``consume`` stands for the consumer, which begins one wait after another."""

    def __init__(self) -> None:
        self.now = 0.0
        families: list[Any] = [Sized(name) for name in NAMES[:2]]
        members = {name: Member(Sized(name).info, 4, None, 0.0, 0.0) for name in NAMES}
        for family in families:
            members[family.info.id].family = family
        self.roster = Roster(members, 8, WAIT_S, lambda: self.now)
        self.engine = Engine(families, record=False)
        self.engine.start()
        self.turns, self.files = Turns(), Files()
        self.swapper = Swapper(cast(Any, self.turns), "worker", self.roster, self.engine, self.files)
        self._ended = threading.Event()
        self._consumer = threading.Thread(target=self._consume)
        self._consumer.start()
        self.wait_once()

    def wait_once(self) -> None:
        """A model may go only once a wait at the broker has begun since it came."""
        while not all(
            self.roster.attention.reached(info.id) for info in self.roster.said().models if info.id not in self.roster.said().cold
        ):
            time.sleep(0.01)

    def _consume(self) -> None:
        while not self._ended.wait(0.002):
            self.roster.attention.choose(QUEUES)

    def watched(self) -> set[str]:
        return {level_1_queue(queue)[: -len(".0")].rpartition(".")[2] for queue in self.roster.attention.choose(QUEUES)}

    def run(self, model: str, seed: int = 0) -> Any:
        with self.roster.use(model) as family:
            return self.engine.submit(work(family, seeds=(seed,), size=(64, 64), steps=2)).result(PATIENCE_S)

    def close(self) -> None:
        self.files.go_on.set()
        self.swapper.stop(PATIENCE_S)
        self._ended.set()
        self._consumer.join(PATIENCE_S)
        self.engine.stop()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def swaps_in_order(jobs: list[str], fit: int) -> int:
    """How often a worker would load a model that did the jobs as they came and let go of the one used least recently."""
    warm, swaps = list(NAMES[:fit]), 0
    for model in jobs:
        if model in warm:
            warm.remove(model)
        else:
            warm.pop(0)
            swaps += 1
        warm.append(model)
    return swaps


def test_200_mixed_jobs_succeed_with_a_third_of_the_swaps_of_their_order(bench: Bench) -> None:
    rng = random.Random(0)
    jobs = [rng.choice(NAMES) for _ in range(NUM_JOBS)]
    waiting = {name: deque(seed for seed, model in enumerate(jobs) if model == name) for name in NAMES}
    done = 0
    for _ in range(10 * NUM_JOBS):
        if not any(waiting.values()):
            break
        bench.swapper.hear({name: bench.now for name in NAMES if waiting[name]})  # all of them came at the beginning
        bench.swapper.run_once()
        for name in sorted(bench.watched()):
            if waiting[name]:
                bench.run(name, waiting[name].popleft())
                done += 1
        bench.now += 1
    assert done == NUM_JOBS
    swaps, in_order = sum(bench.roster.said().swaps.values()), swaps_in_order(jobs, 2)
    print(f"{NUM_JOBS} jobs: {swaps} swaps, {in_order} in the order of arrival")
    assert 2 <= swaps <= in_order / 3
    assert swaps == len(bench.files.loaded)


def test_a_model_leaves_once_its_jobs_have_ended_and_not_before(bench: Bench) -> None:
    bench.now = WAIT_S
    with bench.roster.use("b"):
        pass
    bench.now += 1
    held = bench.roster.use("a")
    family = held.__enter__()
    bench.roster.attention.held.begin(queue_name("b", 0), "1")  # so both have jobs, and "a" came first
    bench.swapper.hear({"a": 0.0, "b": 0.0, "c": WAIT_S})
    swap = in_thread(bench.swapper.run_once)
    while "a" in bench.watched():
        time.sleep(0.01)  # without it this thread would hardly ever let the others have the lock
    assert bench.roster.said().cold == ("c",) and not bench.files.begun.is_set()
    assert bench.engine.submit(work(family, size=(64, 64))).result(PATIENCE_S) is not None, "its jobs go on"
    held.__exit__(None, None, None)
    swap.join(PATIENCE_S)
    assert bench.roster.said().cold == ("a",) and set(bench.engine.families) == {"b", "c"}
    bench.run("c")


def test_other_models_go_on_while_one_is_loaded_and_the_engine_does_not_count_as_stalled(bench: Bench) -> None:
    bench.now = WAIT_S
    bench.files.go_on.clear()
    bench.swapper.hear({"c": WAIT_S})
    swap = in_thread(bench.swapper.run_once)
    assert bench.files.begun.wait(PATIENCE_S)
    assert bench.roster.attention.changing and bench.engine.stalled_for() == 0
    before = bench.engine.num_steps
    bench.run("b")
    assert bench.engine.num_steps > before
    bench.files.go_on.set()
    swap.join(PATIENCE_S)
    assert not bench.roster.attention.changing
    bench.run("c")


def test_the_same_job_gives_the_same_picture_after_its_model_went_and_came_back(bench: Bench) -> None:
    before = bench.run("a", 7)
    for wanted in ("c", "a"):
        bench.now += WAIT_S
        for other in set(NAMES) - {"a", wanted} if wanted == "c" else ():
            with bench.roster.use(other):
                pass
        bench.wait_once()
        bench.swapper.hear({wanted: WAIT_S})
        bench.swapper.run_once()
    assert bench.files.loaded == ["c", "a"]
    assert bench.run("a", 7).equal(before)


def test_of_several_workers_one_at_a_time_loads_a_model(bench: Bench) -> None:
    bench.now, bench.turns.given = WAIT_S, False
    bench.swapper.hear({"c": WAIT_S})
    bench.swapper.run_once()
    bench.swapper.run_once()
    assert bench.turns.taken == [("load:c", WAIT_S)], "asked once for what was heard once"
    assert bench.files.loaded == [] and bench.roster.said().cold == ("c",)


def test_a_model_whose_files_are_gone_costs_no_other_its_place(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.now, bench.files.problem = WAIT_S, ModelError("c/model_index.json: missing from the model")
    bench.swapper.hear({"c": WAIT_S})
    with caplog.at_level(logging.ERROR):
        bench.swapper.run_once()
    assert "c cannot be loaded, next try in 10 s: c/model_index.json: missing" in caplog.text
    assert bench.roster.said().cold == ("c",) and bench.watched() == {"a", "b"}
    bench.run("a")


def test_a_worker_that_shuts_down_waits_for_no_swap(bench: Bench) -> None:
    bench.now = WAIT_S
    with bench.roster.use("a"), bench.roster.use("b"):
        bench.swapper.hear({"c": WAIT_S})
        swap = in_thread(bench.swapper.run_once)
        bench.swapper.stop()
        swap.join(PATIENCE_S)
        assert not swap.is_alive()
    assert bench.roster.said().cold == ("c",)
