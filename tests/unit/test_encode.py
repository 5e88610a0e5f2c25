"""An image file carries its own generation parameters, in every format, in the form that other tools read."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from latentline.jobs import JobRecord, JobRequest, Status, resolve
from latentline.provenance import Made, Provenance
from latentline_worker.images.encode import EXIF_DESCRIPTION, EXIF_IFD, EXIF_USER_COMMENT, encode_image, pixels_digest

PIXELS = np.full((16, 24, 3), (200, 30, 60), dtype=np.uint8)

MADE = Made(
    weights="w" * 64, dtype="float32", sampler="s" * 64, versions={"torch": "2"}, device="cpu", prompt_tokens=40, prompt_tokens_read=32
)


def record(prompt: str, output: dict[str, object]) -> JobRecord:
    request = JobRequest.parse({"prompt": prompt, "negative_prompt": "blurry", "seed": 7, "scheduler": "dpmpp_2m_karras", "output": output})
    return JobRecord(id="j1", request=resolve(request).request, status=Status.RUNNING, num_steps=20, created_at=0)


@pytest.mark.parametrize("prompt", ["a red cat", "ein Kätzchen 🐱"])
def test_png(prompt: str) -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, record(prompt, {"format": "png"}), 9, MADE)[0]))
    lines = image.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:2] == [prompt, "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 9, Size: 24x16, Model: latentline-emoji")
    facts = json.loads(image.text["latentline"])  # type: ignore[attr-defined]
    assert (facts["prompt"], facts["seed"], facts["job_id"]) == (prompt, 9, "j1")
    assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("fmt", ["webp", "jpeg"])
def test_exif(fmt: str) -> None:
    image = Image.open(io.BytesIO(encode_image(PIXELS, record("ein Kätzchen", {"format": fmt, "quality": 95}), 7, MADE)[0]))
    assert image.format == fmt.upper()
    comment = image.getexif().get_ifd(EXIF_IFD)[EXIF_USER_COMMENT]
    assert comment.removeprefix(b"UNICODE\x00").decode("utf-16-be").startswith("ein Kätzchen\nNegative prompt: blurry\nSteps: 20")
    assert json.loads(image.getexif()[EXIF_DESCRIPTION])["prompt"] == "ein Kätzchen"
    assert np.abs(np.asarray(image).astype(int) - PIXELS).max() < 16


def test_quality_counts() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    small, large = (len(encode_image(noise, record("x", {"format": "jpeg", "quality": q}), 1, MADE)[0]) for q in (20, 95))
    assert small < large / 2


@pytest.mark.parametrize("fmt", ["png", "webp", "jpeg"])
def test_a_file_holds_all_that_made_it_and_a_digest_of_the_pixels_that_a_reader_decodes(fmt: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    zeros = "0" * 64  # what a file holds in the digest's place at first: a prompt that says the same is left alone
    prompt = f'"pixels_sha256": "{zeros}" ein Kätzchen 🐱'
    asked = record(prompt, {"format": fmt, "quality": 80})
    data, digest = encode_image(noise, asked, 9, MADE)
    image = Image.open(io.BytesIO(data))
    text = image.text["latentline"] if fmt == "png" else image.getexif()[EXIF_DESCRIPTION]  # type: ignore[attr-defined]
    said = Provenance.model_validate_json(text)
    assert said.pixels_sha256 == digest == pixels_digest(image) != zeros
    assert said.prompt == prompt and said.made == MADE and (said.seed, said.width, said.height) == (9, 64, 64)
    assert said.output.format == fmt and said.scheduler == "dpmpp_2m_karras"
    assert "tenant" not in text and "acme" not in text


@pytest.mark.parametrize("fmt", ["webp", "jpeg"])
def test_the_longest_texts_fit_into_the_metadata(fmt: str) -> None:
    request = record("🐱" * 2000, {"format": fmt}).request.model_copy(update={"negative_prompt": "🐱" * 2000})
    data, _ = encode_image(PIXELS, record("x", {"format": fmt}).model_copy(update={"request": request}), 1, MADE)
    said = Provenance.model_validate_json(Image.open(io.BytesIO(data)).getexif()[EXIF_DESCRIPTION])
    assert said.prompt == said.negative_prompt == "🐱" * 2000


@pytest.mark.parametrize(
    ("fmt", "prompt"), [("png", "x" * 32_000), ("webp", "🐱" * 32_000), ("jpeg", "x" * 31_900), ("jpeg", "🐱" * 4_600)]
)
def test_the_longest_prompts_fit_into_the_file(fmt: str, prompt: str) -> None:
    assert Image.open(io.BytesIO(encode_image(PIXELS, record(prompt, {"format": fmt}), 7, MADE)[0])).size == (24, 16)
