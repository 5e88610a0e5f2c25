"""What happened to a job, on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

import click
from pydantic import ValidationError

from latentline.terminal import say, say_json
from latentline.timeline import Attempt, StepRun, Timeline

from .errors import EXIT_UNAVAILABLE, fail
from .jobs import job_id_argument
from .options import json_option, url_option
from .remote import Api, job_path

WIDTH = 80
BAR = 18  # columns of the bars at the right: the time from the submission to the end, or until now
TEXT = WIDTH - BAR - 22


@click.command()
@job_id_argument
@url_option
@json_option
def timeline(job_id: str, url: str, as_json: bool) -> None:
    """Show what happened to a job: waiting, attempts, steps, callbacks."""
    answer = Api(url).call("GET", job_path(job_id, "/timeline"))
    try:
        found = Timeline.model_validate(answer)
    except ValidationError:
        fail(f"{url} is not a latentline API (its answer has another form)", EXIT_UNAVAILABLE)
    if as_json:
        say_json(answer)
        return
    for line in lines(found):
        say(line)


def lines(found: Timeline) -> Iterator[str]:
    """The timeline as lines of at most ``WIDTH`` columns."""
    end = found.ended_s if found.ended_s is not None else found.now_s

    def row(start: float, took: float | None, text: str) -> str:
        numbers = f"{start:9.3f} {'' if took is None else f'{took:.3f}':>9}  "
        bar = _bar(start, start if took is None else start + took, end)
        return f"{numbers}{text[:TEXT]:{TEXT}}{bar}".rstrip()

    yield f"{found.job_id}  {found.status}"
    yield f"{end:.3f} s, {found.queued_s:.3f} s of them queued"
    yield f"{'start s':>9} {'took s':>9}"
    if found.num_attempts > len(found.attempts):
        yield f"{'':21}({found.num_attempts - len(found.attempts)} earlier attempts are left out)"
    for attempt in found.attempts:
        yield row(attempt.queued_s, attempt.claimed_s - attempt.queued_s, "queue")
        until = end if attempt.ended_s is None else attempt.ended_s
        yield row(attempt.claimed_s, until - attempt.claimed_s, _title(attempt))
        for phase in attempt.phases:
            yield row(phase.start_s, phase.duration_s, f"  {phase.name}")
            if phase.name == "denoising":
                for run in attempt.steps:
                    yield row(run.start_s, sum(ms or 0 for ms in run.durations_ms) / 1000 if run.durations_ms else None, f"    {_run(run)}")
        for mark in attempt.checkpoints:
            yield row(mark.at_s, None, f"  checkpoint of step {mark.step}")
        yield from _made(attempt)
    if not found.attempts or found.attempts[-1].outcome not in ("running", *_TERMINAL):
        since = (found.attempts[-1].ended_s or 0.0) if found.attempts else 0.0
        yield row(since, max(0.0, end - since), "queue")
    for callback in found.callbacks:
        yield row(callback.at_s, None, f"callback {callback.event}: {callback.status}")
        for one in callback.tries:
            yield row(one.at_s, None, f"  {one.result}")
        if callback.due_s is not None:
            yield row(callback.due_s, None, "  next try")


_TERMINAL = ("succeeded", "failed", "cancelled")


def _bar(start: float, until: float, end: float) -> str:
    """Where a span lies between 0 and ``end``; empty for one that begins after it, such as a callback's."""
    if end <= 0 or start > end:
        return ""
    first = min(BAR - 1, int(start / end * BAR))
    last = max(first + 1, min(BAR, round(until / end * BAR)))
    return " " * first + "█" * (last - first)


def _title(attempt: Attempt) -> str:
    resumed = f", from step {attempt.resumed_from}" if attempt.resumed_from else ""
    return f"attempt {attempt.number}, worker {attempt.worker}{resumed}: {attempt.outcome}"


def _run(run: StepRun) -> str:
    """Steps in words: numbers, time of one, company."""
    last = run.first + run.count - 1
    numbers = f"step {run.first}" if run.count == 1 else f"steps {run.first}-{last}"
    known = [ms for ms in run.durations_ms if ms is not None]
    each = f" {sum(known) / len(known):.1f} ms" if known else ""
    rows = "" if run.rows is None else f", {run.rows} rows"
    return f"{numbers}{each}, {run.jobs} job{'s' if run.jobs > 1 else ''}{rows}"


def _made(attempt: Attempt) -> Iterator[str]:
    """What made the pictures, below the spans."""
    made = attempt.made
    if made is None:
        return
    indent = " " * 21
    cut = made.prompt_tokens - made.prompt_tokens_read
    mode = "not reproducible" if made.reproducible_rows is None else f"reproducible, {made.reproducible_rows} rows"
    yield f"{indent}  prompt: {made.prompt_tokens_read} tokens read{f', {cut} cut' if cut else ''}"
    yield f"{indent}  weights {made.weights[:12]}, sampler {made.sampler[:12]}"
    yield f"{indent}  {made.dtype} on {made.device}, {mode}"[:WIDTH]
    for lora in made.loras:
        yield f"{indent}  lora {lora.name} {lora.sha256[:12]}"[:WIDTH]
