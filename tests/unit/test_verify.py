"""Files that ``latentline verify`` is given, and what it says of two pictures. Whole runs: tests/integration/test_verify.py."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentline.cli import main, picture_file, verdict
from latentline.cli.picture_file import MAX_FILE_BYTES, Picture
from latentline.jobs import JobRecord, JobRequest, Status, resolve
from latentline.provenance import Made, Provenance
from latentline_worker.images.encode import encode_image

NOISE = np.random.default_rng(0).integers(20, 230, (64, 64, 3), dtype=np.uint8)
MADE = Made(weights="w" * 64, dtype="float32", sampler="s" * 64, versions={"torch": "2"}, device="cpu")


def file_of(pixels: Any = NOISE, made: Made = MADE, **output: Any) -> bytes:
    request = JobRequest.parse({"prompt": "a cat", "seed": 7, "output": output})
    record = JobRecord(id="j1", request=resolve(request).request, status=Status.RUNNING, num_steps=20, created_at=0)
    return encode_image(pixels, record, 7, made)[0]


def foreign(text: dict[str, str] | None = None, size: tuple[int, int] = (64, 64), exif: str | None = None) -> bytes:
    """A picture that latentline did not make."""
    info, buffer = PngInfo(), io.BytesIO()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    image = Image.new("RGB", size)
    if exif is None:
        image.save(buffer, "PNG", pnginfo=info)
    else:
        found = Image.Exif()
        found[0x010E] = exif
        image.save(buffer, "JPEG", exif=found)
    return buffer.getvalue()


def edited(data: bytes, **fields: Any) -> bytes:
    """The same pixels under changed metadata."""
    picture = picture_file.read(data, "a.png")
    return foreign_pixels(picture.image, {**picture.says.model_dump(mode="json"), **fields})


def foreign_pixels(image: Image.Image, facts: dict[str, Any]) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("latentline", json.dumps(facts))
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


BAD = {
    "empty": (b"", "no picture of these formats"),
    "text": (b"a cat", "no picture of these formats"),
    "gif": (b"GIF89a" + bytes(40), "no picture of these formats"),
    "cut off": (file_of()[:400], "damaged"),
    "cut off webp": (file_of(format="webp")[:300], "damaged"),
    "no metadata": (foreign(), "does not say how it was made"),
    "no metadata, jpeg": (file_of(format="jpeg")[:2] + foreign(exif="")[2:], "another program"),
    "another program's": (foreign({"parameters": "a cat\nSteps: 20, Sampler: Euler a"}), "parameters of another program"),
    "a camera's": (foreign(exif="OLYMPUS DIGITAL CAMERA"), "that of another program"),
    "json of another program": (foreign({"latentline": '{"seed": 1}'}), "does not say how to make it again"),
    "no object": (foreign({"latentline": "[1, 2]"}), "does not say how to make it again"),
    "a sheet": (foreign({"latentline": '{"grid": 1}'}), "a sheet of latentline grid"),
    "a later format": (edited(file_of(), provenance=2), "damaged at 'provenance'"),
    "a path for an id": (edited(file_of(), job_id="../keys"), "damaged at 'job_id'"),
    "no weights": (edited(file_of(), made={}), "damaged at 'made.weights'"),
    "huge sides": (foreign(size=(2049, 8)), "2048 pixels at most"),
}


@pytest.mark.parametrize(("data", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_no_picture_of_ours_is_refused_in_one_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    refused(tmp_path / "a.png", words)


def refused(path: Path, words: str) -> None:
    result = CliRunner().invoke(main, ["verify", str(path), "--url", "http://127.0.0.1:9"])
    lines = result.stderr.splitlines()
    assert (result.exit_code, result.stdout, len(lines)) == (2, "", 1), result.output
    assert lines[0].startswith("latentline: FILE: got '") and words in lines[0] and "; allowed: " in lines[0]


def test_a_file_above_the_cap_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    refused(tmp_path / "large.png", f"{MAX_FILE_BYTES} bytes at most")
    refused(tmp_path / "missing.png", "a file that can be read")


def test_the_largest_picture_is_below_the_cap() -> None:
    assert len(file_of(np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8))) < MAX_FILE_BYTES


@pytest.mark.parametrize("output", [{}, {"format": "webp", "quality": 60}, {"format": "jpeg"}])
def test_edited_pixels_are_named_before_anything_is_asked_of_the_api(tmp_path: Path, output: dict[str, Any]) -> None:
    picture = picture_file.read(file_of(**output), "a")
    assert picture.digest == picture.says.pixels_sha256
    changed = picture.image.copy()
    changed.putpixel((3, 3), tuple(255 - value for value in changed.getpixel((3, 3))))  # type: ignore[arg-type, union-attr]
    cropped = picture.image.crop((0, 0, 64, 32))
    for image, words in ((changed, "edited pixels"), (cropped, "it has 64 x 32 pixels and was made with 64 x 64")):
        path = tmp_path / "a.png"
        path.write_bytes(foreign_pixels(image, picture.says.model_dump(mode="json")))
        result = CliRunner().invoke(main, ["verify", str(path), "--url", "http://127.0.0.1:9"])  # where nothing listens
        assert result.exit_code == 1 and words in result.stdout, result.output


def compared(picture: bytes, again: bytes) -> verdict.Verdict:
    def read(data: bytes) -> Picture:
        return picture_file.read(data, "a")

    return verdict.compare(read(picture), read(again), picture_file)


def test_two_pictures_are_equal_within_the_tolerance_or_different() -> None:
    near, far = NOISE.copy(), NOISE.copy()
    near[0, 0, 0] += 2
    far[0, 0, 0] += 3
    assert (equal := compared(file_of(), file_of())).outcome == "equal" and equal.psnr_db is None and equal.largest_difference == 0
    within = compared(file_of(), file_of(near))
    assert (within.outcome, within.largest_difference) == ("within_tolerance", 2) and "2 of 255" in within.says
    different = compared(file_of(), file_of(far))
    assert (different.outcome, different.largest_difference) == ("different", 3) and "does not reproduce" in different.says
    other = compared(file_of(), file_of(NOISE[:, :32]))
    assert other.outcome == "different" and other.largest_difference is None


def test_half_precision_is_judged_by_its_mean_difference() -> None:
    half = MADE.model_copy(update={"dtype": "bfloat16"})
    near, far = NOISE + np.uint8(1), NOISE + np.uint8(2)
    near[0, 0] += 8
    assert compared(file_of(made=half), file_of(near, half)).outcome == "within_tolerance"
    found = compared(file_of(made=half), file_of(far, half))
    assert (found.outcome, found.tolerance) == ("different", "at least 45 dB") and found.psnr_db == pytest.approx(42.1, abs=0.1)


def test_what_is_otherwise_here_is_named() -> None:
    others = MADE.model_copy(update={"weights": "v" * 64, "device": "cuda"})
    different = compared(file_of(), file_of(255 - NOISE, others))
    assert different.fields == ["made.weights", "made.device"] and "made.weights" in different.says
    equal = compared(file_of(), file_of(made=MADE.model_copy(update={"device": "cuda"})))
    assert equal.outcome == "equal" and "made.device" in equal.says
    assert compared(edited(file_of(), made={**MADE.model_dump(), "weights": "0"}), file_of()).outcome == "edited", "they did not make it"


def test_without_pillow_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "latentline.cli.picture_file")
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "a.png")])
    assert result.exit_code == 2 and "pip install 'latentline[pictures]'" in result.stderr


def test_every_field_of_the_request_that_makes_a_picture_is_compared() -> None:
    says = picture_file.read(file_of(), "a").says
    own = {"seed", "width", "height", "output"}  # compared on their own
    assert set(Provenance.model_fields) == {*verdict.REQUEST_FIELDS, *own, "provenance", "job_id", "made", "pixels_sha256"}
    request = {**says.model_dump(mode="json"), "scheduler": "euler", "prompt": "a dog", "width": 128}
    assert verdict.differing(says, request) == ["prompt", "scheduler", "width"]
