"""Every Python snippet and curl command of the guides runs, as it stands, against the whole stack; addresses and keys are its own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.missing import missing

from latentline.webhooks import generate_secret, sign
from latentline_worker.embedded.stack import Stack

ROOT = Path(__file__).parents[2]
WITH_PYTHON = ("README.md", "docs/usage.md", "docs/guides.md", "docs/dialects.md")
WITH_CURL = ("README.md", "docs/usage.md")
# What the snippets of the guides print, in the order in which they stand.
PRINTED = [r"^2 \[\]\n$", r"^1\n$", r"image_generation\.completed \d+\n$", r"^succeeded image/png private, max-age=3600", r"^$"]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_guides_have_these_snippets() -> None:
    assert len(snippets("docs/guides.md")) == len(PRINTED)


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in WITH_PYTHON for i in range(len(snippets(name)))])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # a snippet need not close
def test_a_snippet_runs(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, number: int
) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    for variable, value in stack.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{stack.url}/openai/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "ll_")
    monkeypatch.setenv("LATENTLINE_API_KEY", "ll_")
    code = snippets(name)[number].replace("http://localhost:8000", stack.url).replace("port=8000", f"port={urlsplit(stack.url).port}")
    left: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code.replace("pixelart", "one"), f"{name}, snippet {number}", "exec"), left)
    printed = capsys.readouterr().out
    assert name != "docs/guides.md" or re.search(PRINTED[number], printed), f"{code}\n{printed}"
    if "predicted" in left:
        secret, text = generate_secret(), json.dumps({"id": "1", "model": "latentline/x", "version": "v", "status": "succeeded"})
        assert left["predicted"](sign(secret, "an id", int(time.time()), text.encode()), text, secret).status == "succeeded"
    if "received" in left:
        secret, body = generate_secret(), json.dumps({"type": "job.succeeded"}).encode()
        assert left["received"](sign(secret, "an id", int(time.time()), body), body, secret) == "job.succeeded"


def ended(http: httpx.Client) -> str:
    """The id of a job that has ended."""
    job = http.post("/v1/jobs", json={"prompt": "a panda", "num_inference_steps": 1}).json()
    while job["status"] in ("queued", "running"):
        job = http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()
    return str(job["id"])


@pytest.mark.parametrize("name", WITH_CURL)
def test_every_curl_command_is_answered(stack: Stack, http: httpx.Client, tmp_path: Path, name: str) -> None:
    if shutil.which("curl") is None:
        missing("curl")
    kept, deleted = ended(http), ended(http)
    commands = re.findall(r"^curl .*$", (ROOT / name).read_text().replace("\\\n", " "), re.MULTILINE)
    assert commands
    for command in commands:
        job = deleted if "DELETE" in command else kept
        command = command.replace("order-17", f"order-{kept}")  # another snippet has used the key
        words = shlex.split(re.sub(r"\bID\b", job, command.replace("localhost:8000", urlsplit(stack.url).netloc)), comments=True)
        done = subprocess.run([*words, "-w", "\n%{http_code}"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.stdout.rpartition("\n")[2] in ("200", "202", "204"), f"{command}\n{done.stdout}"
