"""The HTTP API as the command line uses it, and what it shows and saves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Set
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from latentline.keys import Credential

from .errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNAVAILABLE, fail

TIMEOUT_S = 10.0
POLL_S = 0.2  # between two requests for a job that is waited for

# The fields of the API's answers that this module and the commands read.
JOB_FIELDS = frozenset({"id", "status", "phase", "step", "num_steps", "queue_position", "images", "error", "request"})
MODEL_FIELDS = frozenset({"id", "family", "default_width", "default_height"})
LORA_FIELDS = frozenset({"model", "name"})


class Api:
    """Calls to the API. What goes wrong ends the command with one line on stderr and an exit status."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading the port checks it
        except ValueError:
            usable = False
        if not usable:
            fail(f"--url: got {url!r}; allowed: http://HOST:PORT or https://HOST", EXIT_BAD_INPUT)
        key = os.environ.get("LATENTLINE_API_KEY", "").strip()
        if key and Credential.parse(key) is None:
            fail("LATENTLINE_API_KEY: this is no API key; allowed: ll_..., as latentline keys create shows it", EXIT_BAD_INPUT)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = click.get_current_context().with_resource(httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers))
        self.url = url

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON that one request is answered with."""
        try:
            response = self._http.request(method, path, **options)
            data = response.json() if response.status_code != 204 else None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fail(f"{self.url} does not answer ({type(error).__name__}); is it running? (--url or LATENTLINE_URL)", EXIT_UNAVAILABLE)
        except ValueError:
            fail(f"{self.url} is not a latentline API (its answer is no JSON)", EXIT_UNAVAILABLE)
        if response.is_error:
            error_ = data.get("error") if isinstance(data, dict) else None
            message = error_.get("message") if isinstance(error_, dict) else None
            fail(str(message or f"status {response.status_code}"), EXIT_UNAVAILABLE if response.status_code >= 500 else EXIT_BAD_INPUT)
        return data

    def job(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """A call that is answered with a job."""
        job: dict[str, Any] = self.call(method, path, **options)
        self._check([job], JOB_FIELDS)
        return job

    def page(self, path: str, key: str, fields: Set[str], **options: Any) -> dict[str, Any]:
        """A call that is answered with a list of objects under ``key``, each of which has these fields."""
        answer: dict[str, Any] = self.call("GET", path, **options)
        self._check(answer.get(key) if isinstance(answer, dict) else None, fields)
        return answer

    def _check(self, found: Any, fields: Set[str]) -> None:
        """Fail unless all objects of a list have these fields: the URL may be that of another service that answers with JSON."""
        if not isinstance(found, list) or not all(isinstance(one, dict) and one.keys() >= fields for one in found):
            fail(f"{self.url} is not a latentline API (its answer has another form)", EXIT_UNAVAILABLE)

    def follow(self, job: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
        """Wait for the end of a job with a progress bar on stderr."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(job["status"], total=job["num_steps"])
            while job["status"] in ("queued", "running"):
                if deadline is not None and time.monotonic() > deadline:
                    fail(f"job {job['id']} has not ended within {timeout_s:g} s; it goes on", EXIT_FAILED)
                time.sleep(POLL_S)
                job = self.job("GET", f"/v1/jobs/{job['id']}")
                progress.update(bar, description=job["phase"] or job["status"], completed=job["step"])
        return job


def check_output(output: Path) -> None:
    """Fail before the job is submitted when its images could not be written."""
    folder = output if output.is_dir() or output.suffix == "" else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK) and not (output.exists() and not output.is_dir() and not os.access(output, os.W_OK))
    except OSError:
        usable = False
    if not usable:
        fail(f"-o: got {str(output)!r}; allowed: a file or folder that can be written", EXIT_BAD_INPUT)


def save_images(job: dict[str, Any], output: Path) -> list[Path]:
    """Download every image, check its hash, write it to a file or into a directory."""
    images = job["images"]
    suffix = "." + images[0]["content_type"].partition("/")[2]
    into_folder = output.is_dir() or output.suffix == ""
    target = output / f"{job['id']}{suffix}" if into_folder else output
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(images):
        try:
            data = httpx.get(image["url"], timeout=60).raise_for_status().content
        except httpx.HTTPError as error:
            fail(f"the object store does not give image {i} ({type(error).__name__})", EXIT_UNAVAILABLE)
        if hashlib.sha256(data).hexdigest() != image["sha256"]:
            fail(f"image {i} is damaged: its sha256 is not {image['sha256']}", EXIT_FAILED)
        path = target if len(images) == 1 else target.with_stem(f"{target.stem}-{i}")
        try:
            path.write_bytes(data)
        except OSError as error:
            fail(f"-o: {path} cannot be written: {error.strerror}", EXIT_BAD_INPUT)
        paths.append(path)
    return paths


def show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job, indent=2))
        return
    where = f" {job['phase']}" if job["phase"] and job["status"] == "running" else ""
    place = f" (position {job['queue_position']})" if job["queue_position"] is not None else ""
    click.echo(f"{job['id']}  {job['status']}{where}{place}  step {job['step']}/{job['num_steps']}  {job['request']['prompt'][:60]}")
    if job["error"]:
        click.echo(f"  {job['error']['code']}: {job['error']['message']}")
    for image in job["images"]:
        click.echo(f"  seed {image['seed']}  {image['width']}x{image['height']}  {image['url']}")
