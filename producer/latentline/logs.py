"""The logs of a process, on stderr: lines of text, or JSON objects, one a line (``LATENTLINE_LOG_FORMAT``).

A record about a job carries the job's id and its trace: those of the job that its thread works on, else of the span that it runs in,
else the id that its message begins with. No record holds a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from .tracing import current_traceparent, trace_id_of

log = logging.getLogger(__name__)

LEVEL = logging.INFO
# These log requests with their headers, signatures and signed URLs below INFO.
TALKATIVE = ("botocore", "boto3", "s3transfer", "httpcore", "httpx")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_about: ContextVar[tuple[str, str]] = ContextVar("about", default=("", ""))


@contextmanager
def about_job(job_id: str, traceparent: str = "") -> Iterator[None]:
    """What this thread or task logs in the block is about a job."""
    token = _about.set((job_id, trace_id_of(traceparent)))
    try:
        yield
    finally:
        _about.reset(token)


class JsonLines(logging.Formatter):
    """A record as a JSON object in one line; a field that has no value is left out.

    ``time`` (UTC), ``level``, ``logger``, ``message``, ``job_id``, ``trace_id``, ``worker`` (the process), ``exception`` (its traceback).
    """

    worker = ""

    def format(self, record: logging.LogRecord) -> str:
        job_id, trace_id = _about.get()
        if not job_id and isinstance(record.args, tuple) and record.args and str(record.msg).startswith("job %s"):
            job_id = str(record.args[0])
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "job_id": job_id,
            "trace_id": trace_id or trace_id_of(current_traceparent()),
            "worker": self.worker,
            "exception": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: value for name, value in fields.items() if value})


def set_up_logs(form: Literal["text", "json"], worker: str = "") -> None:
    """Send the records of this process to stderr; for the ``main`` of a service.

    Args:
        worker: the process's name; one that is known later goes to :func:`name_process`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(LEVEL)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(LEVEL, logging.INFO))
    name_process(worker)
    if form == "json":  # nothing else may write lines of its own
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)


def name_process(worker: str) -> None:
    """The name of this process, for records as JSON."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, JsonLines):
            handler.formatter.worker = worker


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        log.critical("an error that nothing handled", exc_info=(kind, error, trace))
