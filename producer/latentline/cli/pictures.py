"""Where ``submit -o`` writes a job's images: checked before the job is made, written once they are there."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import httpx

from .errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNAVAILABLE, fail

DOWNLOAD_S = 60.0
FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def is_folder(output: Path) -> bool:
    """Whether images go into a folder, under names of their own."""
    try:
        return output.is_dir() or output.suffix == ""
    except OSError:  # a name that is too long
        return output.suffix == ""


def format_for(output: Path | None, asked: str | None) -> str | None:
    """The format of the images: the one that was asked for, else the one that the file's name says."""
    if output is None or is_folder(output):
        return asked
    told = FORMATS.get(output.suffix.lower())
    if told is None or asked not in (None, told):
        allowed = f"a name that ends in .{asked}" if asked else "a folder, or a file whose name ends in " + ", ".join(FORMATS)
        fail(f"-o: got {str(output)!r}; allowed: {allowed}", EXIT_BAD_INPUT, field="-o", allowed=allowed)
    return told


def check_output(output: Path) -> None:
    """Fail before the job is submitted when its images could not be written: a file is made where they go, and is gone again."""
    folder = output if is_folder(output) else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if output.exists() and not output.is_dir():
            output.open("r+b").close()
    except OSError as error:
        fail(f"-o: got {str(output)!r}; allowed: a file or folder that can be written ({error.strerror})", EXIT_BAD_INPUT, field="-o")


def save(job: dict[str, Any], output: Path) -> list[Path]:
    """Download every image, check its hash, write it to a file or into a folder."""
    images = job["images"]
    suffix = "." + images[0]["content_type"].partition("/")[2]
    target = output / f"{job['id']}{suffix}" if is_folder(output) else output
    paths = []
    for i, image in enumerate(images):
        data = _download(image, i)
        path = target if len(images) == 1 else target.with_stem(f"{target.stem}-{i}")
        try:
            path.write_bytes(data)
        except OSError as error:
            fail(f"-o: {path} cannot be written: {error.strerror} (job {job['id']} has its images)", EXIT_BAD_INPUT)
        paths.append(path)
    return paths


def _download(image: dict[str, Any], number: int) -> bytes:
    try:
        data = httpx.get(image["url"], timeout=DOWNLOAD_S).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"the object store does not give image {number} ({type(error).__name__})", EXIT_UNAVAILABLE)
    if hashlib.sha256(data).hexdigest() != image["sha256"]:
        fail(f"image {number} is damaged: its sha256 is not {image['sha256']}", EXIT_FAILED)
    return data
