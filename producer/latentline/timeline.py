"""What happened to a job, from submission to its last callback: as a worker tells of an attempt, and as readers get it.

A worker's account of an attempt travels with the call that ends the attempt, as one more field of the event that this call
writes. The rest is read from the job's events, so a timeline costs nothing until somebody asks for it. Times of readers are
seconds after the job's submission, on the broker's clock.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel, Field, ValidationError

from .jobs import Status
from .provenance import Made
from .requests import Message

# Bounds of an account.
MAX_RUNS = 64
MAX_CHECKPOINTS = 16
MAX_BESIDE = 8
MAX_ACCOUNT_BYTES = 8 * 1024

# Bounds of an answer; the newest are kept.
MAX_ATTEMPTS = 4
MAX_CALLBACKS = 8
MAX_TRIES = 12  # of one callback
MAX_RESULT_CHARS = 100
MAX_TIMELINE_BYTES = 64 * 1024


class Run(NamedTuple):
    """Steps that follow each other without a pause, shared by the same number of jobs and rows."""

    first: int
    """Network call, from 1."""
    jobs: int
    rows: int
    at_ms: int
    durations_ms: tuple[float | None, ...]


class Account(Message):
    """A worker's account of one attempt; times in ms after its claim."""

    spans: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Phase -> its start and its length."""
    resumed_from: int = 0
    """Network calls that an earlier attempt had done."""
    runs: tuple[Run, ...] = ()
    num_checkpoints: int = 0
    checkpoints: tuple[tuple[int, int], ...] = ()
    """The newest: step, and when the broker had it."""
    beside: tuple[str, ...] = ()
    """Ids of jobs that shared a step with it, the first few."""
    made: Made | None = None
    span: str = ""
    """Of this attempt in the job's trace (W3C ``traceparent``), where it has one."""

    def to_json(self) -> str:
        """As it is stored: at most ``MAX_ACCOUNT_BYTES``, without its runs if it would be longer."""
        text = self.model_dump_json(exclude_defaults=True)
        return (
            text if len(text.encode()) <= MAX_ACCOUNT_BYTES else self.model_copy(update={"runs": ()}).model_dump_json(exclude_defaults=True)
        )

    @classmethod
    def read(cls, text: str | None) -> Account | None:
        """What is stored; None where there is nothing, or nothing that this version can read."""
        try:
            return cls.model_validate_json(text) if text else None
        except ValidationError:
            return None


class PhaseSpan(BaseModel):
    """A phase of an attempt."""

    name: str
    """``encoding`` (the text), ``waiting`` (for memory), ``denoising``, ``decoding``, ``uploading``."""
    start_s: float
    duration_s: float


class StepRun(BaseModel):
    """Steps that follow each other without a pause and were shared by the same number of jobs."""

    first: int
    """The first one's number, from 1. Some samplers make more than one network call for a step: each of them counts."""
    count: int
    start_s: float
    durations_ms: list[float | None]
    """Of each step. Empty where the worker was lost or still works: then only the reports that it sent are known."""
    jobs: int
    """Jobs that shared these steps, this one among them."""
    rows: int | None
    """Network rows of all of them."""


class CheckpointMark(BaseModel):
    step: int
    at_s: float


class Attempt(BaseModel):
    """One worker's hold on the job."""

    number: int
    worker: int
    """Which of the job's workers, from 1: another number is another worker process."""
    worker_name: str | None
    """For admins."""
    queued_s: float
    """When the job was queued for this attempt."""
    claimed_s: float
    ended_s: float | None
    outcome: str
    """``running``, ``succeeded``, ``failed``, ``cancelled``; ``error`` (another try follows), ``handed_over`` (the worker shut
    down, or let go of the model), ``lost`` (its lease ran out), or ``requeued`` by a worker of an earlier version."""
    resumed_from: int
    """The step from which it went on; 0 from the start."""
    phases: list[PhaseSpan] = Field(default_factory=list)
    steps: list[StepRun] = Field(default_factory=list)
    num_checkpoints: int = 0
    checkpoints: list[CheckpointMark] = Field(default_factory=list)
    """The newest ones."""
    made: Made | None = None
    """What made the pictures: weights, sampler, tokens, versions, device."""
    shared_with: list[str] | None = None
    """Ids of jobs that shared its steps, the first few; for admins."""


class CallbackTry(BaseModel):
    at_s: float
    result: str


class CallbackMark(BaseModel):
    """A status callback."""

    event: str
    status: str
    """``pending``, ``delivered``, ``failed``, ``refused`` (the address is not allowed) or ``gone`` (the receiver answered 410)."""
    at_s: float
    """When it was promised, in the same step as the event."""
    due_s: float | None
    """When the next try is due, while it is pending."""
    num_tries: int
    tries: list[CallbackTry]


class Timeline(BaseModel):
    """What happened to a job. Times are seconds after ``created_at``. At most 64 KiB as JSON."""

    job_id: str
    status: Status
    created_at: datetime
    now_s: float
    ended_s: float | None
    queued_s: float
    """How long it has waited in the queue, over all attempts."""
    num_attempts: int
    attempts: list[Attempt]
    """The newest ones."""
    callbacks: list[CallbackMark]

    def for_owner(self) -> Timeline:
        """Without what only admins see: names of workers, and ids of other jobs."""
        hidden = {"worker_name": None, "shared_with": None}
        return self.model_copy(update={"attempts": [attempt.model_copy(update=hidden) for attempt in self.attempts]})
