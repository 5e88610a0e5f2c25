"""Every Python snippet of the guides runs, as it stands, against the whole stack; only addresses and keys are this stack's."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from latentline.webhooks import generate_secret, sign
from latentline_worker.embedded.stack import Stack

DOCS = Path(__file__).parents[2] / "docs"
# What the snippets of the guides print, in the order in which they stand.
PRINTED = [r"^2 \[\]\n$", r"^1\n$", r"image_generation\.completed \d+\n$", r"^succeeded image/png private, max-age=3600", r"^$"]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_the_guides_have_these_snippets() -> None:
    assert len(snippets("guides.md")) == len(PRINTED)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in ("guides.md", "dialects.md") for i in range(len(snippets(name)))])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # a snippet need not close
def test_a_snippet_runs(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    monkeypatch.setenv("OPENAI_BASE_URL", f"{stack.url}/openai/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "ll_")
    monkeypatch.setenv("LATENTLINE_API_KEY", "ll_")
    code = snippets(name)[number].replace("http://localhost:8000", stack.url).replace("port=8000", f"port={urlsplit(stack.url).port}")
    left: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code.replace("pixelart", "one"), f"{name}, snippet {number}", "exec"), left)
    printed = capsys.readouterr().out
    assert name != "guides.md" or re.search(PRINTED[number], printed), f"{code}\n{printed}"
    if "predicted" in left:
        secret, text = generate_secret(), json.dumps({"id": "1", "model": "latentline/x", "version": "v", "status": "succeeded"})
        assert left["predicted"](sign(secret, "an id", int(time.time()), text.encode()), text, secret).status == "succeeded"
    if "received" in left:
        secret, body = generate_secret(), json.dumps({"type": "job.succeeded"}).encode()
        assert left["received"](sign(secret, "an id", int(time.time()), body), body, secret) == "job.succeeded"
