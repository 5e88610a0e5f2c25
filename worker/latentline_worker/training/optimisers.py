"""Learning rate and optimisers of a schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from .muon import Muon, suits_muon
from .precision import dtype_of
from .recipe import Schedule

FINAL_SHARE = 0.02  # of the peak learning rate, at the last step


def rate_share(step: int, schedule: Schedule, start: int = 0) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to ``FINAL_SHARE``.

    Args:
        start: the step at which this run began with fresh optimisers; the warm-up counts from there.
    """
    warm = min(1.0, (step - start + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
    return warm * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


class Optimisers:
    """AdamW, and Muon for the matrices where the schedule gives it a learning rate.

    Muon takes inner weights only: the first and the last layer map from and to pixels or latents, and stay with AdamW.
    """

    def __init__(self, model: torch.nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        params = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in params if suits_muon(p)] if schedule.muon_learning_rate else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in params if id(p) not in chosen]
        decay = schedule.weight_decay
        self.params = params
        self.parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if rest:
            adamw = torch.optim.AdamW(rest, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=decay)
            self.parts["adamw"] = (adamw, schedule.learning_rate)
        if matrices:
            muon = Muon(matrices, lr=schedule.muon_learning_rate, weight_decay=decay, dtype=dtype_of(schedule.precision))
            self.parts["muon"] = (muon, schedule.muon_learning_rate)

    def step(self, share: float) -> float:
        """Clip the gradients, update every weight at ``share`` of the peak rates; the gradients' norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.schedule.clip_norm or math.inf)
        for optimiser, peak in self.parts.values():
            for group in optimiser.param_groups:
                group["lr"] = peak * share
            optimiser.step()
            optimiser.zero_grad()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimiser.state_dict() for name, (optimiser, _) in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, (optimiser, _) in self.parts.items():
            optimiser.load_state_dict(state[name])
