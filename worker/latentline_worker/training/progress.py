"""A progress bar on a terminal; elsewhere the lines of the log are enough."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SMOOTHING = 0.98  # of the loss that is shown, a step


@contextlib.contextmanager
def progress(total: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Yields what takes the number of steps done and the last loss."""
    if not (shown and sys.stderr.isatty()):
        yield lambda step, loss: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=total, loss=float("nan"))
        smooth: list[float] = []

        def on_step(step: int, loss: float) -> None:
            smooth[:] = [SMOOTHING * smooth[0] + (1 - SMOOTHING) * loss if smooth else loss]
            bar.update(task, completed=step, loss=smooth[0])

        yield on_step
