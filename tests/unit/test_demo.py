"""The demo's report: one line a job, whatever the prompts are, on a terminal of 80 columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from latentline_worker.embedded.demo import SHOWCASE, _report
from latentline_worker.embedded.up import env_file


def lines(**more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"id-{i}", "status": "succeeded", "picture": f"out/{i:02}.png", "prompt": prompt, "sampler": sampler, "steps": steps,
            "wait_s": 12.345, "run_s": 123.45, "seed": 2**32 - 1, "error": None, **more,
        }
        for i, (prompt, sampler, steps, _) in enumerate(SHOWCASE, 1)
    ]  # fmt: skip


def report(found: list[dict[str, Any]]) -> list[str]:
    out = io.StringIO()
    _report(Console(file=out, width=80), found)
    return out.getvalue().splitlines()


def test_every_job_is_one_line() -> None:
    heading, *rows = report(lines())
    assert heading.split() == ["picture", "prompt", "sampler", "steps", "wait", "run", "seed"]
    assert len(rows) == len(SHOWCASE) and max(map(len, rows)) <= 80
    for row, (_, sampler, steps, _) in zip(rows, SHOWCASE, strict=True):
        assert sampler in row and f" {steps} " in row and row.endswith(str(2**32 - 1))


def test_a_strangers_prompt_is_one_harmless_line() -> None:
    _, *rows = report(lines(prompt="[bold]x\n\x1b[2J" + "y" * 200))
    assert len(rows) == len(SHOWCASE) and r"[bold]x\n\x1b[2J"[:8] in rows[0] and "\x1b" not in "".join(rows)


def test_a_failed_job_says_why_below() -> None:
    rows = report(lines(picture=None, status="failed", error="out of\nmemory"))
    assert rows[1].startswith("failed ") and rows[-1] == r"id-16: out of\nmemory"


def test_an_env_file_is_its_owners_alone_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("of a run that was killed")
    path.chmod(0o644)
    with pytest.raises(KeyboardInterrupt), env_file(path, {"A": "it's $HOME; rm -rf /"}):
        assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "export A='it'\"'\"'s $HOME; rm -rf /'\n"
        raise KeyboardInterrupt
    assert not path.exists()
