"""A picture carries its own generation parameters, in every format, readable by other tools' conventions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from latentline.jobs import JobRecord, JobRequest, Status, resolve
from latentline_worker.images.encode import EXIF_DESCRIPTION, EXIF_IFD, EXIF_USER_COMMENT, encode_image

PIXELS = np.full((16, 24, 3), (200, 30, 60), dtype=np.uint8)


def record(prompt: str, output: dict[str, object]) -> JobRecord:
    request = JobRequest.parse({"prompt": prompt, "negative_prompt": "blurry", "seed": 7, "scheduler": "dpmpp_2m_karras", "output": output})
    return JobRecord(id="j1", request=resolve(request).request, status=Status.RUNNING, num_steps=20, created_at=0)


@pytest.mark.parametrize("prompt", ["a red cat", "ein Kätzchen 🐱"])
def test_png(prompt: str) -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, record(prompt, {"format": "png"}), 9)))
    lines = image.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:2] == [prompt, "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 9, Size: 24x16, Model: latentline-emoji")
    facts = json.loads(image.text["latentline"])  # type: ignore[attr-defined]
    assert (facts["prompt"], facts["seed"], facts["job_id"]) == (prompt, 9, "j1")
    assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("fmt", ["webp", "jpeg"])
def test_exif(fmt: str) -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, record("ein Kätzchen", {"format": fmt, "quality": 95}), 7)))
    assert image.format == fmt.upper()
    comment = image.getexif().get_ifd(EXIF_IFD)[EXIF_USER_COMMENT]
    assert comment.removeprefix(b"UNICODE\x00").decode("utf-16-be").startswith("ein Kätzchen\nNegative prompt: blurry\nSteps: 20")
    assert json.loads(image.getexif()[EXIF_DESCRIPTION])["prompt"] == "ein Kätzchen"
    assert np.abs(np.asarray(image).astype(int) - PIXELS).max() < 16


def test_quality_counts() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    small, large = (len(encode_image(noise, record("x", {"format": "jpeg", "quality": q}), 1)) for q in (20, 95))
    assert small < large / 2
