"""Running other programs: quiet while they work, their last lines when they fail."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import CheckError

TAIL_LINES = 15


def output(command: Sequence[str | Path]) -> str:
    """What a command prints; its errors become a CheckError."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise CheckError(f"{command[0]} ended with status {result.returncode}: {last}")
    return result.stdout


def logged(what: str, command: Sequence[str | Path], log: Path) -> None:
    """Run a long command with its output in a file; the file's last lines stand in the error."""
    with log.open("w") as file:
        result = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if result.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise CheckError(f"{what} failed with status {result.returncode}:\n{tail}")
