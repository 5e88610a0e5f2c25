"""What a worker tells of one attempt at a job, for the job's timeline: made of what the engine noted anyway."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

from latentline.timeline import MAX_BESIDE, MAX_CHECKPOINTS, MAX_RUNS, Account, Run
from latentline_worker.engine.request import Request, Step

from .leased_job import LeasedJob

log = logging.getLogger(__name__)

# Phase of an attempt -> the events between which it lies.
PHASES = {
    "encoding": ("submitted", "encoded"),
    "waiting": ("encoded", "joined"),
    "denoising": ("joined", "denoised"),
    "decoding": ("denoised", "decoded"),
}
NO_WAIT_S = 0.001  # a wait for memory that is shorter is none
PAUSE_S = 0.005  # a gap between two steps of a job that counts as a pause, if it is also longer than the step before it


def account_of(job: LeasedJob, span: str = "") -> str:
    """The account as it is stored; empty where the engine did not get to the job. It never fails a job.

    Args:
        span: of the attempt, where it has one.
    """
    request = job.request
    if request is None:
        return ""
    try:
        return _account(job, request, span).to_json()
    except Exception:
        log.exception("job %s: no account of this attempt", job.claim.record.id)
        return ""


def _account(job: LeasedJob, request: Request, span: str) -> Account:
    own = job.claim.record.id
    times = request.times
    spans = {name: (times[start], times[end]) for name, (start, end) in PHASES.items() if start in times and end in times}
    if "waiting" in spans and spans["waiting"][1] - spans["waiting"][0] < NO_WAIT_S:
        del spans["waiting"]
    if job.upload_began is not None and job.upload_ended is not None:
        spans["uploading"] = job.upload_began, job.upload_ended
    others = dict.fromkeys(job_id for step in request.steps for job_id in step.job_ids if job_id != own)

    def ms(moment: float) -> int:
        return max(0, round((moment - job.claimed_at) * 1000))

    return Account(
        spans={name: (ms(start), max(0, round((end - start) * 1000))) for name, (start, end) in spans.items()},
        resumed_from=request.work.resume.step if request.work.resume else 0,
        runs=tuple(Run(first, jobs, rows, ms(at), took) for first, jobs, rows, at, took in _runs(request)),
        num_checkpoints=len(job.checkpoints),
        checkpoints=tuple((step, ms(at)) for step, at in job.checkpoints[-MAX_CHECKPOINTS:]),
        beside=tuple(others)[:MAX_BESIDE],
        made=job.made,
        span=span,
    )


_Run = tuple[int, int, int, float, tuple[float | None, ...]]


def _runs(request: Request) -> list[_Run]:
    """Steps that follow each other with the same company: (first network call, jobs, rows, when, ms of each)."""
    steps = list(request.steps)  # the engine adds no more: the request has ended
    first = (request.work.resume.step if request.work.resume else 0) + 1
    groups: list[list[Step]] = []
    for step in steps:
        if not groups or _differs(groups[-1][-1], step):
            groups.append([])
        groups[-1].append(step)
    while len(groups) > MAX_RUNS:
        groups = [list(chain.from_iterable(groups[i : i + 2])) for i in range(0, len(groups), 2)]
    found = []
    for group in groups:
        jobs, rows = max(len(step.job_ids) for step in group), max(step.rows for step in group)
        found.append((first, jobs, rows, group[0].at, tuple(_milliseconds(steps, request, step) for step in group)))
        first += len(group)
    return found


def _differs(before: Step, step: Step) -> bool:
    """Whether a step begins a new run: other company, or a pause before it."""
    pause_s = step.at - before.at - (before.seconds or 0.0)
    paused = before.seconds is not None and pause_s > max(PAUSE_S, before.seconds)
    return paused or (len(before.job_ids), before.rows) != (len(step.job_ids), step.rows)


def _milliseconds(steps: Sequence[Step], request: Request, step: Step) -> float | None:
    """How long a step took. On CUDA the time of the engine's newest step is not known yet: then until its result was there."""
    seconds = step.seconds
    if seconds is None and step is steps[-1] and "denoised" in request.times:
        seconds = request.times["denoised"] - step.at
    return None if seconds is None else round(max(0.0, seconds) * 1000, 2)
