"""Who takes part in the next denoise step. Torch-free: tested with no model."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Request

# Engine steps of waiting that make up for one remaining step: a job with 100 steps left that has waited
# 400 engine steps stands level with a fresh job of none, so nothing of equal priority starves.
AGEING = 4


class Planner:
    """Priority first, then shortest remaining with ageing, within a budget of network rows.

    Args:
        max_rows: rows of one forward. A single request that needs more runs alone.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}; allowed: at least 1")
        self.max_rows = max_rows

    def select(self, requests: Sequence[Request]) -> list[Request]:
        """The requests of the next step: all of one lane, the most urgent request's own."""
        if not requests:
            return []
        ranked = sorted(requests, key=self._urgency)
        head = ranked[0]
        chosen, rows = [head], head.rows
        for request in ranked[1:]:
            if request.lane == head.lane and rows + request.rows <= self.max_rows:
                chosen.append(request)
                rows += request.rows
        return chosen

    @staticmethod
    def _urgency(request: Request) -> tuple[int, float, float]:
        return request.work.priority, request.remaining - request.waited / AGEING, request.submitted_at
