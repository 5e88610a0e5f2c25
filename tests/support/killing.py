"""Trainings that are killed at chosen points. Each runs in a fork, so that it begins as a new process does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentline_worker.training import state
from latentline_worker.training.loop import Training

Spoil = Callable[[Any, Training], None]
"""Lets a training, of a task, die at some point."""


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(step: int, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of a task, with death in the place of one step."""
    return lambda *args: die() if args[0] == step else loss(*args)


def before_anything(task: Any, training: Training) -> None:
    task.loss = at(0, task.loss)


def in_a_step(task: Any, training: Training) -> None:
    task.loss = at(2, task.loss)


def between_writing_and_renaming(task: Any, training: Training) -> None:
    real = os.replace
    state.os.replace = lambda a, b: die() if training.step == 5 else real(a, b)  # type: ignore[assignment,func-returns-value]


def while_sampling(task: Any, training: Training) -> None:
    task.finish = die


def train_and_kill(make: Callable[[Path], Training], whole: Path, out: Path, spoils: Sequence[Spoil]) -> None:
    """Train once undisturbed in ``whole``, and in ``out`` with a death at each point in turn; prints the points."""

    def fork(folder: Path, spoil: Spoil) -> int:
        child = os.fork()
        if child == 0:
            training = make(folder)
            training.resume()
            spoil(training.task, training)
            training.run()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def undisturbed(task: Any, training: Training) -> None: ...

    assert fork(whole, undisturbed) == 0
    for spoil in spoils:
        assert fork(out, spoil) == signal.SIGKILL, spoil.__name__
        print(spoil.__name__)
    assert fork(out, undisturbed) == 0
