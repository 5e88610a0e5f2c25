"""The lock: many shared holders or one exclusive holder, and an exclusive one is not starved by shared ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from latentline_worker.generate.exclusive import SharedExclusiveLock

PATIENCE_S = 30  # how long a test waits for a signal before it fails; no test measures time


class Crowd:
    """Threads that hold one lock; each says when it holds it, and lets go when told."""

    def __init__(self) -> None:
        self.lock = SharedExclusiveLock()
        self.entered: queue.Queue[str] = queue.Queue()
        self.pool = ThreadPoolExecutor(16)
        self._leave: dict[str, threading.Event] = {}
        self._done: dict[str, Future[None]] = {}

    def send(self, name: str, alone: bool = False) -> None:
        self._leave[name] = threading.Event()

        def go() -> None:
            with self.lock.exclusive() if alone else self.lock.shared():
                self.entered.put(name)
                assert self._leave[name].wait(PATIENCE_S)

        self._done[name] = self.pool.submit(go)

    def next_in(self, count: int = 1) -> set[str]:
        return {self.entered.get(timeout=PATIENCE_S) for _ in range(count)}

    def out(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
        for name in names:
            self._done[name].result(PATIENCE_S)

    def wait_until_one_waits_alone(self) -> None:
        """Until a thread waits for exclusive use: threads that come later must then queue behind it."""
        while self.lock._num_waiting == 0:
            threading.Event().wait(0.001)

    def close(self) -> None:
        for leave in self._leave.values():
            leave.set()
        self.pool.shutdown()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    made = Crowd()
    yield made
    made.close()


def test_shared_holders_are_in_together(crowd: Crowd) -> None:
    for name in "abc":
        crowd.send(name)
    assert crowd.next_in(3) == {"a", "b", "c"}  # none has left yet


def test_an_exclusive_holder_waits_for_every_shared_one_and_keeps_later_ones_out(crowd: Crowd) -> None:
    crowd.send("a")
    crowd.send("b")
    crowd.next_in(2)
    crowd.send("alone", alone=True)
    crowd.wait_until_one_waits_alone()
    crowd.send("late")
    crowd.out("a")
    assert crowd.entered.empty()
    crowd.out("b")
    assert crowd.next_in() == {"alone"}  # before the shared holder that came later
    assert crowd.entered.empty()
    crowd.out("alone")
    assert crowd.next_in() == {"late"}


def test_exclusive_holders_exclude_each_other(crowd: Crowd) -> None:
    for name in ("one", "two", "three"):
        crowd.send(name, alone=True)
    seen: list[str] = []
    for _ in range(3):
        (name,) = crowd.next_in()
        assert crowd.entered.empty()
        crowd.out(name)
        seen.append(name)
    assert sorted(seen) == ["one", "three", "two"]


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_inside_releases_the_lock(alone: bool) -> None:
    lock = SharedExclusiveLock()
    with pytest.raises(RuntimeError, match="inside"), lock.exclusive() if alone else lock.shared():
        raise RuntimeError("inside")
    with ThreadPoolExecutor(1) as pool:

        def take_both_ways() -> str:
            with lock.exclusive():
                pass
            with lock.shared():
                return "taken"

        assert pool.submit(take_both_ways).result(PATIENCE_S) == "taken"


def test_never_an_exclusive_holder_beside_another_in_a_crowd() -> None:
    lock = SharedExclusiveLock()
    counting = threading.Lock()
    inside = {True: 0, False: 0}
    bad: list[dict[bool, int]] = []

    def go(i: int) -> None:
        alone = i % 5 == 0
        with lock.exclusive() if alone else lock.shared():
            with counting:
                inside[alone] += 1
                if inside[True] and sum(inside.values()) > 1:
                    bad.append(dict(inside))
            with counting:
                inside[alone] -= 1

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(go, i) for i in range(2000)]:
            done.result(PATIENCE_S)
    assert bad == []
    assert inside == {True: 0, False: 0}
