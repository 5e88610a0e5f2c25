"""The training loop: steps, averaging, progress, saving, resuming. What a step computes is the task's business."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel

from . import state as states
from .errors import TrainingError
from .optimisers import Optimisers, rate_share
from .precision import autocast, prepare
from .processes import any_of, average_gradients, num_processes
from .recipe import Schedule

SAVE_EVERY_S = 300  # what a kill costs at most; saving takes well under a second

OnStep = Callable[[int, float], None]


class Task(Protocol):
    """One kind of training.

    Attributes:
        model: the module whose weights are trained.
        recipe: a frozen dataclass with a ``schedule``.
        inputs: fingerprints of what else decides the weights, by name; a state made with other ones is refused.
    """

    model: torch.nn.Module
    recipe: Any
    inputs: dict[str, str]

    def loss(self, step: int, rank: int) -> torch.Tensor:
        """The loss of one step, a function of (weights, seed, step, rank) alone."""

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Write a sheet of samples into ``folder`` and measure on held-out data; called with averaged weights."""

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the trained model into ``folder`` in diffusers format; called once with averaged weights."""


class Training:
    """A task, its optimisers and its place in the schedule.

    Args:
        folder: holds the state, the log, the samples and, at the end, the model.
        on_step: called after each step with the number of steps done and the loss.
        rank: number of this process among those that train together.
    """

    def __init__(
        self, task: Task, folder: Path, say: Callable[[str], None], on_step: OnStep = lambda step, loss: None, rank: int = 0
    ) -> None:
        self.task, self.folder, self.say, self.on_step, self.rank = task, folder, say, on_step, rank
        self.schedule: Schedule = task.recipe.schedule
        self.optimisers = Optimisers(task.model, self.schedule)
        self.device: torch.device = next(task.model.parameters()).device
        prepare(task.model, self.schedule.precision)
        self.ema = EMAModel(task.model.parameters(), decay=self.schedule.ema_decay) if self.schedule.ema_decay else None
        self.step = 0
        self.start = 0  # where the optimisers were fresh
        self.stopping = threading.Event()

    def resume(self) -> bool:
        """Continue from the saved state; False where there is none."""
        found = states.load(self.folder, dataclasses.asdict(self.task.recipe), self.task.inputs)
        if found is None:
            return False
        self.task.model.load_state_dict(found["model"])
        self.optimisers.load_state_dict(found["optimisers"])
        if self.ema:
            self.ema.load_state_dict(found["ema"])
            self.ema.to(self.device)
        self.step, self.start = found["step"], found["start"]
        if self.rank == 0:
            self._trim_log()
        for name, number in (("threads", torch.get_num_threads()), ("processes", num_processes())):
            if found.get(name, number) != number:
                self.say(f"the state was made with {found[name]} {name}: with another number, weights differ from an uninterrupted run's")
        return True

    def begin_at(self, step: int) -> None:
        """Begin in the middle of the schedule with the model's present weights and fresh, warmed-up optimisers."""
        self.step = self.start = step
        if self.ema:
            # Averaging goes on at full strength: with a young average, the given weights would be forgotten at once.
            self.ema.optimization_step = step

    def save(self) -> None:
        """Write the state; raises TrainingError where that fails."""
        payload = {
            "step": self.step,
            "start": self.start,
            "model": self.task.model.state_dict(),
            "optimisers": self.optimisers.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "recipe": dataclasses.asdict(self.task.recipe),
            "inputs": self.task.inputs,
            "threads": torch.get_num_threads(),
            "processes": num_processes(),
        }
        if self.rank == 0:
            states.save(self.folder, payload)

    def run(self) -> bool:
        """Train to the end of the schedule; False where a signal stopped it before, with its state saved.

        Raises:
            TrainingError: the loss is no longer a finite number, or something cannot be written.
        """
        try:
            return self._run()
        except OSError as error:
            raise TrainingError(f"{self.folder}: {error}; the last saved state is whole") from error

    def _run(self) -> bool:
        saved_at = logged_at = time.monotonic()
        last_logged = self.step
        losses: list[float] = []
        while self.step < self.schedule.steps:
            losses.append(self.one_step())
            self.step += 1
            self.on_step(self.step, losses[-1])
            if self.step % self.schedule.log_every_steps == 0:
                now = time.monotonic()
                per_s = (self.step - last_logged) * self.schedule.batch * num_processes() / (now - logged_at)
                self._log({"loss": sum(losses) / len(losses), "images_per_s": per_s, "rate": self._share()})
                logged_at, last_logged, losses = time.monotonic(), self.step, []
            if self.step % self.schedule.sample_every_steps == 0 and self.rank == 0:
                self._log(self._averaged(self.task.sample))
                logged_at, last_logged = time.monotonic(), self.step
            if any_of(self.stopping.is_set()):
                self.save()
                return False
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                self.save()
                saved_at = time.monotonic()
        self.save()
        if self.rank == 0:
            self._log(self._averaged(lambda folder, _: self.task.finish(folder)))
        return True

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within it, SIGTERM and SIGINT end the run at the next step, saved. For the main thread alone."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, lambda *_: self.stopping.set()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def one_step(self) -> float:
        """One step of the schedule, which the caller counts; its loss."""
        self.task.model.train()
        with autocast(self.device, self.schedule.precision):
            loss = self.task.loss(self.step, self.rank)
        value = float(loss.detach())
        if any_of(not math.isfinite(value)):
            raise TrainingError(f"the loss is {value} at step {self.step}: lower the learning rate; the last saved state is from before")
        loss.backward()
        average_gradients(self.optimisers.params)
        self.optimisers.step(self._share())
        if self.ema:
            self.ema.step(self.task.model.parameters())
        return value

    def _share(self) -> float:
        return rate_share(self.step, self.schedule, self.start)

    def _averaged(self, use: Callable[[Path, int], dict[str, float]]) -> dict[str, float]:
        """Call with the averaged weights in the model, then put the trained ones back."""
        self.task.model.eval()
        if self.ema:
            self.ema.store(self.task.model.parameters())
            self.ema.copy_to(self.task.model.parameters())
        try:
            with torch.no_grad():
                return use(self.folder, self.step)
        finally:
            if self.ema:
                self.ema.restore(self.task.model.parameters())

    def _log(self, figures: dict[str, float]) -> None:
        if self.rank:
            return
        line = {"step": self.step, "time": round(time.time()), **{name: round(value, 5) for name, value in figures.items()}}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(f"step {self.step}/{self.schedule.steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def _trim_log(self) -> None:
        """Drop what was logged after the saved state: those steps are done again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [
                line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= self.step
            ]
            path.write_text("".join(kept))
