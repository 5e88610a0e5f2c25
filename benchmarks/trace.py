"""Job traces: every way of running gets the same jobs at the same times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

PROMPTS = ("a cat", "a rocket", "a red apple", "a robot", "a house", "a panda", "a guitar", "a sunflower")
SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "unipc")
GUIDANCE = (1.0, 5.0)  # one row in a step, or two
MAX_STATIC_BATCH = 8  # jobs that static batching runs together
SHORT_STEPS = 8  # jobs of at most this many steps count as short


@dataclass(frozen=True)
class Job:
    """One job of a trace; ``arrival_s`` counts from the trace's start."""

    prompt: str
    scheduler: str
    steps: int
    guidance_scale: float
    seed: int
    arrival_s: float = 0.0

    @property
    def short(self) -> bool:
        return self.steps <= SHORT_STEPS

    @property
    def rows(self) -> int:
        """Network rows of one step."""
        return 2 if self.guidance_scale > 1 else 1


def closed(count: int, seed: int = 0, steps: tuple[int, int] = (4, 50)) -> list[Job]:
    """``count`` mixed jobs that all arrive at the start, with uniformly distributed step counts."""
    rng = random.Random(seed)
    return [Job(rng.choice(PROMPTS), rng.choice(SCHEDULERS), rng.randint(*steps), rng.choice(GUIDANCE), seed=i) for i in range(count)]


def equal(count: int, steps: int = 20) -> list[Job]:
    """``count`` guided jobs that differ in seed and prompt only and all arrive at the start: the best case of static batching."""
    return [Job(PROMPTS[i % len(PROMPTS)], SCHEDULERS[0], steps, 5.0, seed=i) for i in range(count)]


def poisson(jobs: Sequence[Job], rate: float, seed: int = 0) -> list[Job]:
    """The jobs with exponentially distributed gaps between arrivals, ``rate`` jobs per second on average."""
    rng = random.Random(seed)
    now = 0.0
    timed = []
    for job in jobs:
        now += rng.expovariate(rate)
        timed.append(replace(job, arrival_s=now))
    return timed
