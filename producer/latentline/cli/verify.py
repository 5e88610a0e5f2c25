"""Whether a picture is what its file says: by its digest, by its job's record, and by making it again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from latentline.provenance import Made, Provenance
from latentline.terminal import say, say_json

from .errors import EXIT_FAILED, fail
from .extras import load
from .following import follow
from .options import json_option, url_option
from .remote import Api, job_path
from .verdict import GOOD, REQUEST_FIELDS, Verdict, compare, differing

if TYPE_CHECKING:
    from .picture_file import Picture


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds to wait.")
@url_option
@json_option
def verify(file: Path, timeout_s: float, url: str, as_json: bool) -> None:
    """Make a picture again and say whether it is the same.

    It is equal to the bit or within the tolerance (exit status 0), or it is different, or its pixels or fields were edited (1).
    """
    module = load("latentline.cli.picture_file", "latentline verify", "pictures")
    picture: Picture = module.read_file(file)
    api = Api(url)
    found = _edited_pixels(picture) or _edited_fields(api, picture.says) or _made_again(api, picture, module, timeout_s)
    if as_json:
        say_json({"file": str(file), "of_job": picture.says.job_id, **vars(found)})
    else:
        say(f"{file}: {found.says}")
    if found.outcome not in GOOD:
        sys.exit(EXIT_FAILED)


def _edited_pixels(picture: Picture) -> Verdict | None:
    says, (width, height) = picture.says, picture.image.size
    if (width, height) != (says.width, says.height):
        message = f"edited: it has {width} x {height} pixels and was made with {says.width} x {says.height}"
        return Verdict("edited", message, fields=["width", "height"])
    if picture.digest != says.pixels_sha256:
        message = f"edited pixels: their digest is {picture.digest[:12]}, and the file says {says.pixels_sha256[:12]}"
        return Verdict("edited", message, fields=["pixels_sha256"])
    return None


def _edited_fields(api: Api, says: Provenance) -> Verdict | None:
    """What differs from the job's record, while there is one that this key may see."""
    job = api.find_job(says.job_id)
    if job is None:
        return None
    fields = differing(says, job["request"])
    image = next((one for one in job["images"] if one.get("pixels_sha256") == says.pixels_sha256), None)
    if image is None:
        if not job["images"]:
            return None  # an API or a worker of an earlier version
        fields.append("pixels_sha256")
    elif image["seed"] != says.seed:
        fields.append("seed")
    made = _last_made(api.call("GET", job_path(says.job_id, "/timeline"), or_none=True))
    if made is not None:
        fields += [f"made.{name}" for name in Made.model_fields if getattr(made, name) != getattr(says.made, name)]
    if not fields:
        return None
    shown = ", ".join(_shown(name, says) for name in fields)
    return Verdict("edited", f"edited: job {says.job_id} says otherwise of {shown}", fields=fields)


def _shown(name: str, says: Provenance) -> str:
    """A field of the file with its value, shortened."""
    value: Any = says
    for part in name.split("."):
        value = getattr(value, part)
    text = repr(value)
    return f"{name} ({text if len(text) <= 40 else text[:37] + '...'})"


def _last_made(timeline: Any) -> Made | None:
    """What made the pictures of a job, as its timeline says."""
    try:
        found = [attempt["made"] for attempt in timeline["attempts"] if attempt["made"]]
        return Made.model_validate(found[-1]) if found else None
    except (KeyError, TypeError, ValidationError):
        return None


def _made_again(api: Api, picture: Picture, module: Any, timeout_s: float) -> Verdict:
    says = picture.says
    body = says.model_dump(mode="json", include={*REQUEST_FIELDS, "width", "height", "seed", "output"})
    job = api.job("POST", "/v1/jobs", json={**body, "num_images": 1})
    job = follow(api, job, timeout_s)
    if job["status"] != "succeeded":
        reason = f"{job['error']['code']}: {job['error']['message']}" if job["error"] else job["status"]
        fail(f"the job that makes it again did not succeed ({reason})", EXIT_FAILED)
    again: Picture = module.read(api.picture(job["id"], 0), f"image 0 of job {job['id']}")
    return compare(picture, again, module)
