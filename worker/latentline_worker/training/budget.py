"""A training budget in wall-clock time that survives restarts: progress, learning rate and checkpoints.

Training on a shared machine is planned in minutes, not in steps: the learning rate follows the share of
the time budget used, so that a slower machine still ends on a fully decayed rate.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Budget:
    """Counts seconds over restarts and says when to save.

    Args:
        minutes: the whole budget, over all restarts.
        checkpoint: where the state of model, optimiser and budget is kept; resumed from when it exists.
        save_every_s: seconds between checkpoints.
    """

    def __init__(self, minutes: float, checkpoint: Path, save_every_s: float = 60.0) -> None:
        self.total_s = minutes * 60
        self.checkpoint = checkpoint
        self.save_every_s = save_every_s
        self.used_s = 0.0
        self.step = 0
        checkpoint.parent.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.used_s / self.total_s)

    def learning_rate(self, peak: float, warmup_steps: int = 100) -> float:
        """Linear warm-up, then a half cosine over the time budget."""
        return peak * min(1.0, (self.step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def steps(self, state: dict[str, Any]) -> Iterator[int]:
        """Yield step numbers until the time is used up; ``state`` maps names to objects with a state_dict."""
        self._restore(state)
        saved_at = time.monotonic()
        while self.progress < 1.0:
            start = time.monotonic()
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.used_s += now - start
            if now - saved_at > self.save_every_s:
                self._save(state)
                saved_at = time.monotonic()
        self._save(state)

    def _save(self, state: dict[str, Any]) -> None:
        payload = {name: thing.state_dict() for name, thing in state.items()}
        scratch = self.checkpoint.with_suffix(".tmp")
        torch.save(payload | {"budget": {"used_s": self.used_s, "step": self.step}}, scratch)
        os.replace(scratch, self.checkpoint)  # atomic: a kill during the save leaves the older checkpoint whole

    def _restore(self, state: dict[str, Any]) -> None:
        if not self.checkpoint.exists():
            return
        payload = torch.load(self.checkpoint, weights_only=True)
        for name, thing in state.items():
            thing.load_state_dict(payload[name])
        self.used_s, self.step = payload["budget"]["used_s"], payload["budget"]["step"]
