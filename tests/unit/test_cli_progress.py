"""What `latentline submit --wait` draws on a terminal, and what it writes where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from support.commands import served

COMMAND = [sys.executable, "-m", "latentline.cli", "submit", "a cat", "--steps", "100", "--wait"]


def test_without_a_terminal_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as service:
        service.start()
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr), "no control characters"


def test_progress_on_a_terminal_is_one_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as service:
        service.start()
        drawn, out = on_a_terminal()
    assert b"\x1b" not in out and b"succeeded" in out
    codes = set(re.findall(r"\x1b\[[0-9;?]*([A-Za-z])", drawn))
    assert codes <= set("mKhlA"), "colours, lines wiped, the cursor hidden, shown and moved up"
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in re.split(r"[\r\n]+|\x1b\[2K", drawn)]
    shown = [frame for frame in frames if frame.strip()]
    assert len(shown) > 1 and all(len(frame) <= 80 and "/100" in frame for frame in shown)
    lines_up, lines_down = len(re.findall(r"\x1b\[1A", drawn)), drawn.count("\n")
    assert lines_up == lines_down, "drawn in its own place"
    assert drawn.rstrip().endswith("\x1b[2K"), "and gone at the end"


def on_a_terminal() -> tuple[str, bytes]:
    """What the command draws on a terminal of 80 columns as its stderr, and what it writes to stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen(COMMAND, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    drawn = b""
    try:
        with contextlib.suppress(OSError):  # how Linux tells that the other side has closed
            while more := os.read(ours, 65536):
                drawn += more
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert process.returncode == 0, drawn
    return drawn.decode(), out
