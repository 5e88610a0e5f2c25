"""Jobs over HTTP: submit, status, cancel, delete."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from latentline.jobs import JobRequest
from latentline.terminal import note, say, say_json, short

from .axes import lora_of
from .errors import EXIT_BAD_INPUT, EXIT_FAILED, fail
from .following import follow
from .options import json_option, url_option
from .pictures import check_output, format_for, save
from .remote import Api, job_path

PROMPT_CHARS = 60  # of a prompt in a list


def _job_id(_: click.Context, __: click.Parameter, value: str) -> str:
    """An id as it is. Anything else could be another path of the API."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", value):
        allowed = "an id that `latentline submit` or `latentline jobs` has printed"
        fail(f"JOB_ID: got {value[:80]!r}; allowed: {allowed}", EXIT_BAD_INPUT, field="JOB_ID", allowed=allowed)
    return value


job_id_argument = click.argument("job_id", callback=_job_id)


@click.command()
@click.argument("prompt")
@click.option("--model")
@click.option("--negative-prompt")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", "num_inference_steps", type=int)
@click.option("--guidance", "guidance_scale", type=float)
@click.option("--scheduler", help="One of the model's own: latentline models --json lists them.")
@click.option("--lora", "loras", multiple=True, metavar="NAME[:SCALE]", help="An adapter of the model; may be repeated.")
@click.option("--seed", type=int)
@click.option("-n", "num_images", type=int, help="Number of images.")
@click.option("--format", "format_", help="png, webp or jpeg")
@click.option("--quality", type=int, help="1 to 100, for webp and jpeg")
@click.option("--priority", type=int, help="0 (first) to 9")
@click.option("--deadline", "deadline_s", type=float, help="Seconds.")
@click.option("--tenant")
@click.option("--callback-url")
@click.option("--wait", is_flag=True, help="Follow the job to its end; Ctrl-C leaves it running.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), help="Seconds to wait at most.")
@click.option(
    "-o", "output", type=click.Path(path_type=Path), help="File or folder for the images; implies --wait. A file's name says the format."
)
@url_option
@json_option
def submit(
    url: str, as_json: bool, wait: bool, timeout_s: float | None, output: Path | None, callback_url: str | None,
    format_: str | None, quality: int | None, loras: tuple[str, ...], **fields: Any,
) -> None:  # fmt: skip
    """Submit a job."""
    format_ = format_for(output, format_)
    body = {name: value for name, value in fields.items() if value is not None}
    if chosen := {name: value for name, value in (("format", format_), ("quality", quality)) if value is not None}:
        body["output"] = chosen
    if loras:
        body["loras"] = [lora_of(text, "--lora") for text in loras]
    if callback_url is not None:
        body["callback"] = {"url": callback_url}
    JobRequest.parse(body)  # the API's own limits, checked without a round trip
    if output:
        check_output(output)
    api = Api(url)
    job = api.job("POST", "/v1/jobs", json=body)
    if wait or output:
        job = follow(api, job, timeout_s)
    if output and job["status"] == "succeeded":
        for path in save(job, output):
            note(f"wrote {path}")
    show(job, as_json)
    if job["status"] in ("failed", "cancelled"):
        sys.exit(EXIT_FAILED)


@click.command()
@job_id_argument
@url_option
@json_option
def status(job_id: str, url: str, as_json: bool) -> None:
    """Show a job."""
    show(Api(url).job("GET", job_path(job_id)), as_json)


@click.command()
@job_id_argument
@url_option
@json_option
def cancel(job_id: str, url: str, as_json: bool) -> None:
    """Cancel a job."""
    show(Api(url).job("POST", job_path(job_id, "/cancel")), as_json)


@click.command()
@job_id_argument
@url_option
@json_option
def delete(job_id: str, url: str, as_json: bool) -> None:
    """Delete a job that has ended, and its pictures."""
    Api(url).call("DELETE", job_path(job_id))
    if as_json:
        say_json({"id": job_id, "deleted": True})
    else:
        say(f"{job_id}  deleted")


def show(job: dict[str, Any], as_json: bool) -> None:
    """A job on stdout: a line, one for why it failed, one for each image."""
    if as_json:
        say_json(job)
        return
    where = f" {job['phase']}" if job["phase"] and job["status"] == "running" else ""
    place = f" (position {job['queue_position']})" if job["queue_position"] is not None else ""
    prompt = short(job["request"]["prompt"], PROMPT_CHARS)
    say(f"{job['id']}  {job['status']}{where}{place}  step {job['step']}/{job['num_steps']}  {prompt}")
    if job["error"]:
        say(f"  {job['error']['code']}: {job['error']['message']}")
    for image in job["images"]:
        say(f"  seed {image['seed']}  {image['width']}x{image['height']}  {image['url']}")
