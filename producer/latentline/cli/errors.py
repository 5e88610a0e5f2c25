"""Exit statuses of the command line, and errors as one line on stderr.

The rule: 0 it was done; 1 it was done and came to a bad end; 2 what was asked for is wrong, and the same again fails again;
3 a service does not answer or cannot take it now, and the same may work later; 130 it was interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from latentline.errors import InvalidRequest, LatentlineError
from latentline.settings import Settings
from latentline.terminal import note, note_json

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 1, 2, 3, 128 + signal.SIGINT
CODES = {EXIT_FAILED: "failed", EXIT_BAD_INPUT: "bad_input", EXIT_UNAVAILABLE: "unavailable", EXIT_INTERRUPTED: "interrupted"}
LATER = frozenset((408, 429, 502, 503, 504))  # statuses after which the same request may be accepted later
MAX_MESSAGE_CHARS = 2000  # of what another service says


class Failed(Exception):
    """Ends a command.

    Args:
        message: for people, one line.
        status: the exit status.
        code: stable and machine-readable.
        more: further members of the error with ``--json``.
    """

    def __init__(self, message: str, status: int, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.more = message[:MAX_MESSAGE_CHARS], status, code or CODES[status], more


def fail(message: str, status: int, code: str | None = None, **more: Any) -> NoReturn:
    """End the command with one line on stderr and this exit status."""
    raise Failed(message, status, code, **more)


def status_of(http_status: int) -> int:
    """The exit status for an error with this HTTP status."""
    return EXIT_UNAVAILABLE if http_status in LATER else EXIT_BAD_INPUT


class Commands(click.Group):
    """The root of all commands. Whatever goes wrong in one ends as one line on stderr and an exit status, never as a traceback.

    With ``--json`` the line is a JSON object: ``{"error": {"code", "message", ...}}``, the shape of the API's errors.
    """

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        try:
            # Without the part of click that prints errors by itself: it would repeat control characters of the arguments.
            status = super().main(given, prog_name, **{**extra, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_BAD_INPUT)
        except Exception as error:
            problem = failed(error)
            if "--json" in options:
                note_json({"error": {"code": problem.code, "message": problem.message, **problem.more}})
            else:
                note(f"latentline: {problem.message}")
            sys.exit(problem.status)
        sys.exit(status if isinstance(status, int) else 0)


def failed(error: Exception) -> Failed:
    """Any exception as the end of a command."""
    if isinstance(error, Failed):
        return error
    if isinstance(error, LatentlineError):
        more = {"field": error.field, "allowed": error.allowed} if isinstance(error, InvalidRequest) else {}
        return Failed(error.message, status_of(error.http_status), error.code, **more)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "latentline"
        return Failed(f"{error.format_message()} ({command} -h shows what there is)", EXIT_BAD_INPUT)
    if isinstance(error, click.ClickException):
        return Failed(error.format_message(), EXIT_BAD_INPUT)
    if isinstance(error, click.Abort):
        return Failed("interrupted", EXIT_INTERRUPTED)
    if sys.flags.dev_mode:  # python -X dev
        log.error("a defect of the command", exc_info=error)
    return Failed(
        f"this is a defect of latentline: {type(error).__name__}: {error} (python -X dev -m latentline.cli shows where)",
        EXIT_FAILED,
        "internal",
    )


def check_settings() -> None:
    """Fail with the name of a LATENTLINE_* variable that is wrong, before anything starts."""
    from pydantic import ValidationError

    try:
        Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = f"LATENTLINE_{str(first['loc'][0]).upper()}" if first["loc"] else "LATENTLINE_*"
        fail(f"{name}: {first['msg']}", EXIT_BAD_INPUT)
