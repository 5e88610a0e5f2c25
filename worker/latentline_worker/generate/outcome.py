"""How the work on a claimed job ended, and so what happens to its record."""

from __future__ import annotations

from dataclasses import dataclass

from latentline.errors import LatentlineError, OutOfMemory, ServiceUnavailable
from latentline.jobs import ImageRef, JobError
from latentline_worker.engine.failures import out_of_memory
from latentline_worker.engine.request import Cancelled


@dataclass(frozen=True)
class Succeeded:
    """Every image is in the store."""

    images: tuple[ImageRef, ...]


@dataclass(frozen=True)
class Failed:
    """Trying again would not help."""

    error: JobError


@dataclass(frozen=True)
class TryAgain:
    """Another try may succeed."""

    error: JobError


@dataclass(frozen=True)
class CancelRequested:
    """A client cancelled the job."""


@dataclass(frozen=True)
class HandOver:
    """This worker shuts down, or has let go of the model: the job goes back to the queue with its newest checkpoint."""

    reason: str


@dataclass(frozen=True)
class NotOurs:
    """The lease is lost or given up: the record belongs to another worker, or soon will."""

    reason: str


Outcome = Succeeded | Failed | TryAgain | CancelRequested | HandOver | NotOurs


def of_exception(problem: Exception, uploading: bool = False) -> Outcome:
    """The outcome of work that ended in an exception. The text of an internal error stays out of the client's answer.

    Args:
        problem: the exception.
        uploading: whether the images were made, and were being encoded and uploaded.
    """
    if isinstance(problem, Cancelled):
        return _of_stop(problem.reason)
    if isinstance(problem, LatentlineError):
        error = JobError(code=problem.code, message=problem.message)
        return TryAgain(error) if isinstance(problem, ServiceUnavailable) else Failed(error)
    if out_of_memory(problem):
        if uploading:  # the job fitted; the host's memory is shared with other uploads and may be free again later
            return TryAgain(JobError(code=OutOfMemory.code, message="the worker had no memory left to store the images"))
        return Failed(JobError(code=OutOfMemory.code, message="the job does not fit into the worker's memory"))
    return TryAgain(JobError(code="internal_error", message="the worker failed on this job; its log has the details"))


def _of_stop(reason: str) -> Outcome:
    match reason:
        case "stale":
            return NotOurs("another worker owns it now")
        case "lost":
            return NotOurs("left to other workers, who take it when its lease has run out")
        case "shutdown":
            return HandOver("this worker shuts down")
        case "cold":
            return HandOver("its model is not in memory here")
        case "expired":
            return Failed(JobError(code="deadline_exceeded", message="the deadline passed before the job ended"))
        case _:
            return CancelRequested()
