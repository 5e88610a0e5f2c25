"""Exit statuses of the command line, and errors as one line on stderr."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import click

from latentline.errors import LatentlineError
from latentline.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNAVAILABLE = 1, 2, 3


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit with this status."""
    click.echo(f"latentline: {message}", err=True)
    sys.exit(code)


def clear_errors(command: Callable[P, T]) -> Callable[P, T]:
    """One line on stderr and an exit status instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except LatentlineError as error:
            fail(error.message, EXIT_UNAVAILABLE if error.http_status == 503 else EXIT_BAD_INPUT)

    return wrapped


def check_settings() -> None:
    """Exit with the name of a LATENTLINE_* variable that is wrong, before anything starts."""
    from pydantic import ValidationError

    try:
        Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = f"LATENTLINE_{str(first['loc'][0]).upper()}" if first["loc"] else "LATENTLINE_*"
        fail(f"{name}: {first['msg']}", EXIT_BAD_INPUT)
