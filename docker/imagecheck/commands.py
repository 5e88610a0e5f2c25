"""Running other programs: quiet while they work, their last lines when they fail, none left when the check is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from .errors import CheckError

TAIL_LINES = 15


def output(command: Sequence[str | Path]) -> str:
    """What a command prints; its errors become a CheckError."""
    status, printed, complaint = _run(command, subprocess.PIPE)
    if status:
        last = (complaint.strip() or printed.strip() or "it printed nothing").splitlines()[-1]
        raise CheckError(f"{command[0]} ended with status {status}: {last}")
    return printed


def logged(what: str, command: Sequence[str | Path], log: Path) -> None:
    """Run a long command with its output in a file; the file's last lines stand in the error."""
    with log.open("w") as file:
        status, _, _ = _run(command, file)
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise CheckError(f"{what} failed with status {status}:\n{tail}")


def _run(command: Sequence[str | Path], to: int | IO[str]) -> tuple[int, str, str]:
    """Status, output and errors. The command leads a group of processes, which ends with it when the check is stopped."""
    words = [str(part) for part in command]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=to, stderr=to, text=True, start_new_session=True) as process:
        try:
            printed, complaint = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, printed or "", complaint or ""
