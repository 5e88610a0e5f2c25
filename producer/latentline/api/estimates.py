"""When jobs will have ended: estimates from what workers measure."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping, Sequence

from latentline import records
from latentline.async_client import AsyncClient
from latentline.errors import LatentlineError
from latentline.jobs import JobRecord, Status
from latentline.models import StepCost

LIFE_S = 5.0  # between two looks at what workers tell, and only while somebody asks
NOTED_SHARE = 0.2  # a measured time that differs by less is the same: an estimate that never rests is a new answer for each poll


class Estimates:
    """One object for each application. An estimate never waits for the broker: the first ones are unknown."""

    life_s = LIFE_S

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._costs: Mapping[str, Sequence[StepCost]] = {}
        self._at = -math.inf
        self._task: asyncio.Task[None] | None = None

    def eta_s(self, record: JobRecord) -> float | None:
        """Seconds until the last step of a job, to two digits; None where that is not known, and for a job that has ended."""
        if record.status.terminal:
            return None
        if time.monotonic() - self._at > self.life_s and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self.look(), name="step costs")
        return estimate(record, self._costs.get(record.request.model, ()))

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Read what workers tell."""
        with contextlib.suppress(LatentlineError):  # what was known stays until a later look
            found = await self._client.run(records.step_costs())
            self._costs = {model: _steady(self._costs.get(model, ()), costs) for model, costs in found.items()}
        self._at = time.monotonic()


def estimate(record: JobRecord, costs: Sequence[StepCost]) -> float | None:
    """Seconds until the last step of a job: the jobs before it in the queue, taken to be as large as it is, then its own steps.

    Args:
        costs: what a step takes on each worker of its model. Batches are taken to be full.
    """
    request = record.request
    if not costs or not request.width or not request.height:
        return None
    # Steps take as long as they have pixels: too little for a larger picture, whose attention costs more than that.
    scaled = [request.width * request.height / cost.pixels for cost in costs]
    step_s = sum(cost.step_s * scale for cost, scale in zip(costs, scaled, strict=True)) / len(costs)
    seconds = (record.num_steps - record.step) * step_s
    if record.status is Status.QUEUED:
        if record.queue_position is None or not record.cost:
            return None
        rows_per_s = sum(cost.rows / (cost.step_s * scale) for cost, scale in zip(costs, scaled, strict=True))
        seconds += record.queue_position * record.cost / rows_per_s
    return float(f"{seconds:.2g}")


def _steady(old: Sequence[StepCost], new: Sequence[StepCost]) -> Sequence[StepCost]:
    """The old costs while the new ones hardly differ."""
    same = len(old) == len(new) and all(_close(a, b) for a, b in zip(old, new, strict=True))
    return old if same else new


def _close(a: StepCost, b: StepCost) -> bool:
    return (a.rows, a.pixels) == (b.rows, b.pixels) and abs(a.step_s - b.step_s) <= NOTED_SHARE * a.step_s
