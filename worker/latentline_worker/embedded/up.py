"""``latentline up``: a stack in the foreground, which says what it does and how other terminals reach it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from latentline.errors import ConfigurationError, LatentlineError
from latentline.terminal import note, note_json, note_lines, say, say_json_line

from .stack import Stack

ENV_FILE = "latentline.env"


def up(data_dir: Path | None, port: int, model: str | None, as_json: bool = False) -> int:
    """Run a stack until SIGINT, SIGTERM or SIGHUP; 1 when a part fails.

    On stdout stands ``ready URL`` once it serves, on stderr how the parts start; with ``as_json`` all of it as JSON lines on stdout.
    """
    ending = threading.Event()

    def interrupt(*_: object) -> None:
        if ending.is_set():
            return  # already stopping: let it finish in order
        ending.set()
        raise KeyboardInterrupt  # also out of a start that is under way

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix="latentline-") as scratch:
        folder = data_dir or Path(scratch)
        try:
            with Stack(folder, port, model, _tell_json if as_json else _tell) as stack:
                variables = {**stack.environment, "LATENTLINE_URL": stack.url}
                with env_file(folder.resolve() / ENV_FILE, variables) as path:
                    (_ready_json if as_json else _ready)(stack.url, path, stack.metrics)
                    while (dead := stack.dead()) is None:
                        time.sleep(0.5)
                raise ConfigurationError(f"{dead.name} ended with status {dead.process.returncode}:\n{dead.tail()}")
        except KeyboardInterrupt:
            return 0
        except LatentlineError as error:
            if as_json:
                note_json({"error": {"code": error.code, "message": error.message}})
            else:
                note_lines(f"latentline up: {error.message}")
            return 1


@contextlib.contextmanager
def env_file(path: Path, variables: Mapping[str, str]) -> Iterator[Path]:
    """A file for a shell to read (``. FILE``) that sets these variables. It holds passwords: its owner alone can read it."""
    path.unlink(missing_ok=True)  # of a run that was killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _tell(part: str, does: str, seconds: float | None) -> None:
    note(f"{part:<13}{does}" + ("" if seconds is None else f" after {seconds:.1f} s"))


def _tell_json(part: str, does: str, seconds: float | None) -> None:
    say_json_line({"part": part, "does": does, "seconds": None if seconds is None else round(seconds, 3)})


def _ready(url: str, path: Path, metrics: Mapping[str, str]) -> None:
    say(f"ready {url}")
    for line in (
        *(f"metrics      {part}: {address}" for part, address in metrics.items()),
        "",
        "Ctrl-C stops everything. In another terminal:",
        f"  latentline submit --url {url} 'a red apple' -o apple.png",
        f"  . {shlex.quote(str(path))}; latentline dead list    # the same for keys, callbacks",
    ):
        note(line)


def _ready_json(url: str, path: Path, metrics: Mapping[str, str]) -> None:
    say_json_line({"part": "all", "does": "ready", "url": url, "env_file": str(path), "metrics": dict(metrics)})
