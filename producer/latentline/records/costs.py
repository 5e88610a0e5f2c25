"""What denoising takes on the fleet, as its workers' heartbeats tell."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from latentline import routing
from latentline.models import StepCost, Working

from .driving import Operation
from .fleet import workers


def step_costs() -> Operation[dict[str, Sequence[StepCost]]]:
    """Model id -> what a step takes on each of the workers that are alive and tell it, in two round trips."""
    names = yield from workers()

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.get(routing.working_key(name))
        return pipeline.execute()

    found: dict[str, list[StepCost]] = {}
    for text in (yield call) if names else ():
        with contextlib.suppress(ValidationError):  # none, or of a version that this code cannot read
            for model, cost in Working.model_validate_json(text or "").costs.items():
                found.setdefault(model, []).append(cost)
    return {model: tuple(costs) for model, costs in found.items()}
