"""``latentline verify`` on the real stack. Its equality to the bit on other workers and after a resume: tests/faults/test_workers.py."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.jobs import PATIENCE_S

from latentline.cli import main
from latentline_worker.embedded.stack import Stack

Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(stack: Stack, tmp_path: Path) -> Verify:
    def call(data: bytes) -> tuple[int, dict[str, Any]]:
        (tmp_path / "picture").write_bytes(data)
        result = CliRunner().invoke(main, ["verify", str(tmp_path / "picture"), "--json", "--url", stack.url])
        assert result.stdout, result.output
        return result.exit_code, json.loads(result.stdout)

    return call


def make(http: httpx.Client, **fields: Any) -> tuple[str, list[bytes]]:
    """A job, and its pictures' files."""
    answer = http.post("/v1/jobs", json={"prompt": "a red apple", "num_inference_steps": 6, "seed": 11, **fields})
    job = http.get(f"/v1/jobs/{answer.raise_for_status().json()['id']}", params={"wait": PATIENCE_S}).json()
    assert job["status"] == "succeeded", job
    return job["id"], [http.get(f"/v1/jobs/{job['id']}/images/{i}").content for i in range(len(job["images"]))]


def with_facts(data: bytes, **changed: Any) -> bytes:
    """The same pixels, whose metadata somebody has changed."""
    image, info, buffer = Image.open(io.BytesIO(data)), PngInfo(), io.BytesIO()
    facts = json.loads(image.info["latentline"])
    info.add_text("latentline", json.dumps({**facts, **changed, "made": {**facts["made"], **changed.get("made", {})}}))
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_a_picture_reproduces_also_when_others_run_beside_it(http: httpx.Client, verify: Verify) -> None:
    fields = {"scheduler": "sa_solver", "loras": [{"name": "one", "scale": 0.5}], "negative_prompt": "blurry"}
    _, (first, second) = make(http, num_images=2, **fields)
    http.post("/v1/jobs", json={"prompt": "a green cup", "num_inference_steps": 40, "num_images": 3}).raise_for_status()
    for data in (first, second):
        code, found = verify(data)
        assert (code, found["outcome"]) in ((0, "equal"), (0, "within_tolerance")), found
        assert found["largest_difference"] <= 2 and found["fields"] == []


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_a_lossy_picture_reproduces(http: httpx.Client, verify: Verify, kind: str) -> None:
    code, found = verify(make(http, output={"format": kind, "quality": 80})[1][0])
    assert code == 0, found


def test_what_was_edited_is_named_while_the_record_lives(http: httpx.Client, verify: Verify) -> None:
    job_id, (data, other) = make(http, num_images=2)
    before = http.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["id"]
    edits: list[tuple[list[str], dict[str, Any]]] = [
        (["seed"], {"seed": 12}),  # that of the job's other picture
        (["prompt"], {"prompt": "a green apple"}),
        (["guidance_scale", "loras"], {"guidance_scale": 7.0, "loras": [{"name": "one"}]}),
        (["made.weights"], {"made": {"weights": "0" * 64}}),
        (["made.versions", "made.device"], {"made": {"versions": {"torch": "1"}, "device": "cuda"}}),
    ]
    for fields, changed in edits:
        code, found = verify(with_facts(data, **changed))
        assert (code, found["outcome"], found["fields"]) == (1, "edited", fields), found
        assert all(name in found["says"] for name in fields)
    pixels = Image.open(io.BytesIO(other)).convert("RGB").rotate(90)
    redone = io.BytesIO()
    pixels.save(redone, "PNG", pnginfo=_info(other))
    assert verify(redone.getvalue())[1]["fields"] == ["pixels_sha256"]
    assert http.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["id"] == before, "no job was made for any of them"

    http.delete(f"/v1/jobs/{job_id}").raise_for_status()
    code, found = verify(with_facts(data, seed=99))
    assert (code, found["outcome"]) == (1, "different") and "does not reproduce" in found["says"]
    code, found = verify(data)
    assert code == 0 and found["of_job"] == job_id != found["job_id"]


def _info(data: bytes) -> PngInfo:
    info = PngInfo()
    info.add_text("latentline", Image.open(io.BytesIO(data)).info["latentline"])
    return info


def test_what_cannot_be_made_here_is_said(http: httpx.Client, stack: Stack, tmp_path: Path) -> None:
    job_id, (data,) = make(http)
    http.delete(f"/v1/jobs/{job_id}").raise_for_status()
    for changed, words in (({"model": "no-such-model"}, "no-such-model"), ({"scheduler": "euler9"}, "scheduler: got 'euler9'; allowed")):
        (tmp_path / "a.png").write_bytes(with_facts(data, **changed))
        result = CliRunner().invoke(main, ["verify", str(tmp_path / "a.png"), "--url", stack.url])
        assert result.exit_code in (2, 3) and words in result.stderr and len(result.stderr.splitlines()) == 1, result.output
