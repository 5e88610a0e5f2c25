"""The spans of attempts. They are made when an attempt has ended, of what its account and its events tell for the timeline anyway:
nothing is traced while steps run, and a trace says the same as the timeline.

An attempt is told by the worker that ends it. One that no worker ended, since its worker was lost, is told by the worker of the next
attempt, as far as its events know it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from latentline.errors import LatentlineError
from latentline.jobs import JobRecord
from latentline.records import AttemptStory, Records
from latentline.timeline import Account, Attempt
from latentline.tracing import attributes_of, context_of, link_to, traceparent_of

from .account import account_of
from .leased_job import LeasedJob

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

BAD_OUTCOMES = ("failed", "error", "lost")


@dataclass
class Ending:
    """The end of an attempt."""

    account: str
    """For the record."""
    outcome: str = ""
    """What came of the call, as in :class:`latentline.timeline.Attempt`; empty while the job is not known to be this worker's."""
    error: str = ""


class AttemptSpans:
    """Makes the spans of the attempts that this worker ends.

    Args:
        tracer: None makes no spans.
    """

    def __init__(self, tracer: Tracer | None, records: Records) -> None:
        self._tracer, self._records = tracer, records

    @contextmanager
    def ending(self, job: LeasedJob) -> Iterator[Ending]:
        """Around the call that ends an attempt. Its spans are made if that call was this worker's to make; they never fail the job."""
        span, began = self._begin(job), time.monotonic()
        if span is None:
            yield Ending(account_of(job))
            return
        ending = Ending(account_of(job, traceparent_of(span.get_span_context())))
        yield ending
        if ending.outcome:
            calls = (("claim", job.claim_began, job.claimed_at), ("settle", began, time.monotonic()))
            try:
                self._tell(job, span, ending, [(name, _after(job, start), _after(job, end)) for name, start, end in calls])
            except Exception:
                log.exception("job %s: no spans of this attempt", job.claim.record.id)

    def _begin(self, job: LeasedJob) -> Span | None:
        """The span of an attempt, from its claim on; None where its trace is not kept."""
        if self._tracer is None:
            return None
        record = job.claim.record
        try:
            span = _start(self._tracer, context_of(record.traceparent), record, _after(job, job.claim_began))
        except Exception:
            log.exception("job %s: no spans of this attempt", record.id)
            return None
        return span if span.is_recording() else None

    def _tell(self, job: LeasedJob, span: Span, ending: Ending, calls: Sequence[tuple[str, float, float]]) -> None:
        """Make the spans of earlier attempts that nobody told of, then those of this one; ``calls`` to the broker are among them."""
        assert self._tracer is not None
        record = job.claim.record
        stories = self._stories(record)
        earlier = [story for story in stories if story.number < record.attempt]
        untold = list(takewhile(lambda story: story.account is None, reversed(earlier)))[::-1]
        rest = earlier[: len(earlier) - len(untold)]
        link = rest[-1].account.span if rest and rest[-1].account else ""
        for story in untold:
            lost = _start(self._tracer, context_of(record.traceparent), record, story.claimed_s, link)
            self._describe(lost, record, story.as_answer(story.ended_s or story.claimed_s), ())
            link = traceparent_of(lost.get_span_context())
        for one in link_to(link):
            span.add_link(one.context)
        queued_s = next((story.queued_s for story in stories if story.number == record.attempt), 0.0)
        ended_s = calls[-1][2]
        story = AttemptStory(record.attempt, 0, record.worker, queued_s, _after(job, job.claimed_at), 0, ended_s, ending.outcome)
        story.account = Account.read(ending.account)
        if ending.error:
            span.set_attribute("error.type", ending.error)
        self._describe(span, record, story.as_answer(ended_s), calls)

    def _stories(self, record: JobRecord) -> list[AttemptStory]:
        """Of all attempts, where there were others; none where the broker does not tell, for one since its users' rules are old."""
        try:
            return self._records.attempts(record) if record.attempt > 1 else []
        except LatentlineError as error:
            log.warning("job %s: the spans of its earlier attempts are missing: %s", record.id, error.message)
            return []

    def _describe(self, span: Span, record: JobRecord, attempt: Attempt, more: Sequence[tuple[str, float, float]]) -> None:
        """Fill an attempt's span, give it its children and end it. Times are seconds after the submission."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        assert self._tracer is not None
        inside = set_span_in_context(span)
        queue = self._tracer.start_span("queue", context_of(record.traceparent) or inside, start_time=_ns(record, attempt.queued_s))
        queue.end(_ns(record, attempt.claimed_s))
        for name, start_s, end_s in (*more, *((one.name, one.start_s, one.start_s + one.duration_s) for one in attempt.phases)):
            child = self._tracer.start_span(name, inside, start_time=_ns(record, start_s))
            if name == "denoising":
                _add_steps(child, record, attempt)
            child.end(_ns(record, end_s))
        told: dict[str, str | int | None] = {
            "attempt": attempt.number,
            "outcome": attempt.outcome,
            "worker": attempt.worker_name,
            "resumed_from": attempt.resumed_from,
        }
        span.set_attributes({f"latentline.{name}": value for name, value in told.items() if value is not None})
        if attempt.outcome in BAD_OUTCOMES:
            span.set_status(StatusCode.ERROR)
        span.end(_ns(record, attempt.claimed_s if attempt.ended_s is None else attempt.ended_s))


def _start(tracer: Tracer, parent: Context | None, record: JobRecord, start_s: float, link: str = "") -> Span:
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind

    return tracer.start_span(
        "attempt",
        Context() if parent is None else parent,  # without a parent it begins a trace
        SpanKind.CONSUMER,
        attributes=attributes_of(record),
        links=link_to(link),
        start_time=_ns(record, start_s),
    )


def _add_steps(span: Span, record: JobRecord, attempt: Attempt) -> None:
    """An event for each run of steps with the same company, and for the newest checkpoints: the account bounds how many there are."""
    for run in attempt.steps:
        told = {"first": run.first, "count": run.count, "jobs": run.jobs, "rows": run.rows}
        took = [ms for ms in run.durations_ms if ms is not None]
        if took:
            told["mean_ms"] = round(sum(took) / len(took))
        span.add_event("steps", {name: value for name, value in told.items() if value is not None}, _ns(record, run.start_s))
    for mark in attempt.checkpoints:
        span.add_event("checkpoint", {"step": mark.step}, _ns(record, mark.at_s))


def _after(job: LeasedJob, moment: float) -> float:
    """A time of this process's ``time.monotonic()`` as seconds after the submission; the broker's clock told when the job was claimed."""
    record = job.claim.record
    return (record.started_at or record.created_at) - record.created_at + moment - job.claimed_at


def _ns(record: JobRecord, after_s: float) -> int:
    """Seconds after the submission as OpenTelemetry counts time."""
    return round((record.created_at + after_s) * 1e9)
