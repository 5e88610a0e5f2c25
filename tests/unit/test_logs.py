"""Logs as JSON: their fields, one line a record, and whose job and trace a record is about."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError
from support.collector import TRACE_ID, TRACEPARENT, in_trace
from support.stubs import PATIENCE_S

from latentline.logs import JsonLines, about_job
from latentline.settings import Settings

JOB = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """Its records are kept in ``log.lines`` as they would be written."""
    logger = logging.Logger("latentline.test")  # none of the process's own
    formatter, lines = JsonLines(), []
    formatter.worker = "gpu0@host:1"

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(formatter.format(record))

    logger.addHandler(Lines())
    logger.lines = lines  # type: ignore[attr-defined]
    yield logger


def last(log: Any) -> dict[str, Any]:
    line: str = log.lines[-1]
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_a_record_has_the_fields_that_have_a_value(log: logging.Logger) -> None:
    log.info("two lines\nof %s", "text")
    fields = last(log)
    assert datetime.fromisoformat(fields.pop("time")).utcoffset() is not None
    assert fields == {"level": "info", "logger": "latentline.test", "message": "two lines\nof text", "worker": "gpu0@host:1"}


def test_an_exception_is_a_field(log: logging.Logger) -> None:
    try:
        raise OSError("no route")
    except OSError:
        log.exception("job %s: broke", JOB)
    fields = last(log)
    assert fields["exception"].startswith("Traceback") and fields["exception"].endswith("OSError: no route")
    assert (fields["level"], fields["job_id"]) == ("error", JOB)


def test_what_a_thread_logs_while_it_works_on_a_job_is_about_that_job(log: logging.Logger) -> None:
    with about_job(JOB, TRACEPARENT):
        log.info("a file was stored")
        assert (last(log)["job_id"], last(log)["trace_id"]) == (JOB, TRACE_ID)
    log.info("idle")
    assert not {"job_id", "trace_id"} & last(log).keys()
    with in_trace(TRACEPARENT):
        log.info("a request")
    assert last(log)["trace_id"] == TRACE_ID


SERVICE = """
import logging, sys, threading, warnings
from latentline.logs import set_up_logs
set_up_logs(sys.argv[1], "one")
logging.getLogger("botocore.endpoint").debug("a request with its body")
logging.getLogger("latentline.a").info("job %s: done", "7")
warnings.warn("an old name")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise SystemExit("bye") if sys.argv[1] == "text" else RuntimeError("no\\nmore")
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_service_writes_nothing_but_records(form: str) -> None:
    command, env = [sys.executable, "-c", SERVICE, form], os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "" and "body" not in done.stderr
    if form == "text":
        assert " INFO latentline.a: job 7: done\n" in done.stderr
        return
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [one["level"] for one in told] == ["info", "warning", "critical", "critical"]
    assert "an old name" in told[1]["message"]
    assert [one["exception"].splitlines()[-1] for one in told[2:]] == ["ZeroDivisionError: division by zero", "more"]
    assert {one["worker"] for one in told} == {"one"}


def test_another_format_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValidationError, match="'text' or 'json'"):
        Settings.from_variables({"LATENTLINE_LOG_FORMAT": "xml"})
