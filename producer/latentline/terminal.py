"""What goes to a terminal. All text of the command line passes through here: much of it is a stranger's prompt, error or name."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any, TextIO

import click

# Bidirectional controls: a name that holds one shows what follows it in another order.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Control characters, surrogates, and separators of lines and paragraphs: a terminal obeys them, or they forge a line.
_REPLACED = frozenset(("Cc", "Cs", "Zl", "Zp"))


def clean(text: object) -> str:
    """Text as one line that a terminal shows and does not obey: what controls it is written as an escape, such as ``\\x1b``."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _REORDERING or unicodedata.category(character) in _REPLACED
        else character
        for character in str(text)
    )


def clean_lines(text: object) -> str:
    """The same for text that has several lines, such as the end of a log."""
    return "\n".join(clean(line) for line in str(text).split("\n"))


def short(text: object, length: int) -> str:
    """Text as one line of at most so many characters."""
    line = clean(text)
    return line if len(line) <= length else line[: length - 1] + "…"


def say(line: object) -> None:
    """A line on stdout: a result."""
    _write(clean(line), sys.stdout)


def note(line: object) -> None:
    """A line on stderr: what happens meanwhile, and what went wrong."""
    _write(clean(line), sys.stderr)


def note_lines(text: object) -> None:
    """Several lines on stderr, such as the end of a log."""
    _write(clean_lines(text), sys.stderr)


def say_json(data: Any) -> None:
    """A result as one JSON object."""
    _write(_json(data, indent=2), sys.stdout)


def say_json_line(data: Any) -> None:
    """One of several results, as a JSON object in one line."""
    _write(_json(data), sys.stdout)


def note_json(data: Any) -> None:
    """A JSON object in one line on stderr."""
    _write(_json(data), sys.stderr)


def _json(data: Any, indent: int | None = None) -> str:
    # ASCII alone, so that nothing in it controls a terminal; DEL is the one control character that json leaves as it is.
    return json.dumps(data, indent=indent).replace("\x7f", "\\u007f")


def _write(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
