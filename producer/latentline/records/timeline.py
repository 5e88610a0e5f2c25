"""A job's timeline, read from its record, its events and its callbacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from latentline import routing
from latentline.jobs import JobRecord, Status
from latentline.timeline import (
    MAX_ATTEMPTS,
    MAX_CALLBACKS,
    MAX_RESULT_CHARS,
    MAX_RUNS,
    MAX_TRIES,
    Account,
    Attempt,
    CallbackMark,
    CallbackTry,
    CheckpointMark,
    PhaseSpan,
    StepRun,
    Timeline,
)

from .driving import Operation
from .events import START
from .jobs import get, not_found

_CALLBACK_FIELDS = ("type", "status", "tries", "log", "at", "due")


def timeline(job_id: str, tenant: str | None = None) -> Operation[Timeline]:
    """What happened to a job, in two round trips.

    Args:
        tenant: whose job it has to be; None for any.

    Raises:
        JobNotFound: there is none, its retention is over, or it is another tenant's.
    """
    record = yield from get(job_id)
    if tenant not in (None, record.request.tenant):
        raise not_found(job_id)
    wanted = _callback_ids(record)

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.xread({routing.events_key(job_id): START})
        for callback_id in wanted:
            pipeline.hmget(routing.callback_key(callback_id), _CALLBACK_FIELDS)
        return pipeline.execute()

    (seconds, microseconds), reply, *found = yield call
    story = _Story(record.created_at)
    for entry in _entries(reply):
        story.tell(entry)
    attempts, now = story.attempts, seconds + microseconds / 1e6
    waited = (
        story.waited_s if story.waiting_since is None else story.waited_s + story.after(record.finished_at or now) - story.waiting_since
    )
    return Timeline(
        job_id=record.id,
        status=record.status,
        created_at=datetime.fromtimestamp(record.created_at, UTC),
        now_s=story.after(now),
        ended_s=None if record.finished_at is None else story.after(record.finished_at),
        queued_s=round(waited, 4),
        num_attempts=len(attempts),
        attempts=[attempt.as_answer(story.after(now)) for attempt in attempts[-MAX_ATTEMPTS:]],
        callbacks=[_callback(story, dict(zip(_CALLBACK_FIELDS, one, strict=True))) for one in found if one[0]],
    )


def attempts(record: JobRecord) -> Operation[list[AttemptStory]]:
    """Every attempt at a job as its events tell of it, in one round trip."""
    reply = yield lambda client: client.xread({routing.events_key(record.id): START})
    story = _Story(record.created_at)
    for entry in _entries(reply):
        story.tell(entry)
    return story.attempts


class _Entry(NamedTuple):
    kind: str
    at: float
    data: dict[str, Any]
    account: Account | None


def _entries(reply: Any) -> Iterable[_Entry]:
    """The events of one stream, as the blocking clients and the asyncio ones give them."""
    streams = reply.values() if isinstance(reply, dict) else [entries for _, entries in reply or []]
    for entries in streams:
        for entry in entries if not entries or isinstance(entries[0], tuple) else [one for batch in entries for one in batch]:
            fields: Mapping[str, str] = entry[1]
            data = json.loads(fields.get("data") or "{}")
            yield _Entry(fields["type"], float(fields["at"]), data, Account.read(fields.get("account")))


@dataclass
class AttemptStory:
    """An attempt as its events tell of it; times are seconds after the submission. Fields are those of :class:`Attempt`."""

    number: int
    worker: int
    worker_name: str | None
    queued_s: float
    claimed_s: float
    resumed_from: int
    ended_s: float | None = None
    outcome: str = "running"
    account: Account | None = None
    reports: list[tuple[float, str, int, int]] = field(default_factory=list)  # when, phase, step, jobs of the last network call

    def as_answer(self, now_s: float) -> Attempt:
        told = self._by_worker(self.account) if self.account else self._by_reports(now_s if self.ended_s is None else self.ended_s)
        return Attempt(
            number=self.number,
            worker=self.worker,
            worker_name=self.worker_name,
            queued_s=self.queued_s,
            claimed_s=self.claimed_s,
            ended_s=self.ended_s,
            outcome=self.outcome,
            **{"resumed_from": self.resumed_from, **told},
        )

    def _by_worker(self, account: Account) -> dict[str, Any]:
        def after(ms: int) -> float:
            return round(self.claimed_s + ms / 1000, 4)

        spans = sorted(account.spans.items(), key=lambda span: span[1])
        return {
            "phases": [PhaseSpan(name=name, start_s=after(start), duration_s=took / 1000) for name, (start, took) in spans],
            "steps": [
                StepRun(
                    first=run.first,
                    count=len(run.durations_ms),
                    start_s=after(run.at_ms),
                    durations_ms=list(run.durations_ms),
                    jobs=run.jobs,
                    rows=run.rows,
                )
                for run in account.runs
            ],
            "resumed_from": account.resumed_from,
            "num_checkpoints": account.num_checkpoints,
            "checkpoints": [CheckpointMark(step=step, at_s=after(at)) for step, at in account.checkpoints],
            "made": account.made,
            "shared_with": list(account.beside),
        }

    def _by_reports(self, until_s: float) -> dict[str, Any]:
        """Of a worker that was lost, still works, or is of an earlier version: what it has reported, and its last phase until then."""
        phases: list[PhaseSpan] = []
        steps: list[StepRun] = []
        begun, phase, done, since = self.claimed_s, "encoding", self.resumed_from, self.claimed_s
        for at, now, step, jobs in self.reports:
            if now != phase:
                phases.append(PhaseSpan(name=phase, start_s=begun, duration_s=round(at - begun, 4)))
                begun, phase, since = at, now, since if step > done else at
            if step > done:
                if (steps and steps[-1].jobs == jobs) or len(steps) == MAX_RUNS:
                    steps[-1].count += step - done
                    steps[-1].jobs = max(steps[-1].jobs, jobs)
                else:
                    steps.append(StepRun(first=done + 1, count=step - done, start_s=since, durations_ms=[], jobs=jobs, rows=None))
                done, since = step, at
        phases.append(PhaseSpan(name=phase, start_s=begun, duration_s=round(until_s - begun, 4)))
        return {"phases": phases, "steps": steps}


class _Story:
    """The attempts at a job, from its events in their order."""

    def __init__(self, created_at: float) -> None:
        self._created_at = created_at
        self._workers: dict[str, int] = {}
        self.attempts: list[AttemptStory] = []
        self.waiting_since: float | None = 0.0
        self.waited_s = 0.0

    def after(self, at: float) -> float:
        """A time on the broker's clock as seconds after the submission."""
        return max(0.0, round(at - self._created_at, 4))

    def tell(self, entry: _Entry) -> None:
        at, attempt = self.after(entry.at), self.attempts[-1] if self.attempts else None
        if entry.kind == "job.running":
            self._begin(at, entry.data)
        elif attempt is None or attempt.ended_s is not None:
            if entry.kind not in ("job.queued", "job.progress", "job.preview") and self.waiting_since is not None:  # ended in the queue
                self.waited_s, self.waiting_since = self.waited_s + at - self.waiting_since, None
        elif entry.kind == "job.progress":
            data = entry.data
            attempt.reports.append((at, str(data.get("phase")), int(data.get("step", 0)), int(data.get("batch_jobs") or 1)))
        elif entry.kind != "job.preview":
            queued = entry.kind == "job.queued"
            attempt.ended_s, attempt.account = at, entry.account
            attempt.outcome = str(entry.data.get("reason") or "requeued") if queued else entry.kind.removeprefix("job.")
            self.waiting_since = at if queued else None

    def _begin(self, at: float, data: Mapping[str, Any]) -> None:
        since = at if self.waiting_since is None else self.waiting_since
        self.waited_s, self.waiting_since = self.waited_s + at - since, None
        name = data.get("worker")
        worker = self._workers.setdefault(str(name), len(self._workers) + 1)
        self.attempts.append(AttemptStory(len(self.attempts) + 1, worker, name, since, at, int(data.get("step") or 0)))


def _callback_ids(record: JobRecord) -> list[str]:
    """The callbacks that this job may have by now, as lib/outbox.lua names them; the newest."""
    events: Sequence[str] = record.request.callback.events if record.request.callback else ()
    found = [f"running_{number}" for number in range(1, record.attempt + 1) if "job.running" in events]
    if f"job.{record.status}" in events and record.status is not Status.RUNNING:
        found.append(record.status.value)
    return [f"msg_{record.id}_{name}" for name in found[-MAX_CALLBACKS:]]


def _callback(story: _Story, raw: Mapping[str, str]) -> CallbackMark:
    log = json.loads(raw.get("log") or "[]")
    return CallbackMark(
        event=raw["type"],
        status=raw["status"],
        at_s=story.after(float(raw["at"])),
        due_s=story.after(float(raw["due"])) if raw["status"] == "pending" else None,
        num_tries=len(log),
        tries=[CallbackTry(at_s=story.after(one["at"]), result=str(one["result"])[:MAX_RESULT_CHARS]) for one in log[-MAX_TRIES:]],
    )
