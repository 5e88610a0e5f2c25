"""The HTTP API as the command line uses it."""

from __future__ import annotations

import os
from collections.abc import Set
from typing import Any
from urllib.parse import quote, urlsplit

import click
import httpx

from latentline.keys import Credential

from .errors import EXIT_BAD_INPUT, EXIT_UNAVAILABLE, fail, status_of

TIMEOUT_S = 10.0

# The fields of the API's answers that the commands read.
JOB_FIELDS = frozenset({"id", "status", "phase", "step", "num_steps", "queue_position", "images", "error", "request"})
MODEL_FIELDS = frozenset({"id", "family", "default_width", "default_height"})  # an API of an earlier version has no others
LORA_FIELDS = frozenset({"model", "name"})


class Api:
    """Calls to the API. What goes wrong ends the command with one line on stderr and an exit status."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reading the port checks it
            self._http = click.get_current_context().with_resource(httpx.Client(base_url=url, timeout=TIMEOUT_S))
        except (ValueError, httpx.InvalidURL):
            usable = False
        if not usable:
            fail(f"--url: got {url!r}; allowed: http://HOST:PORT or https://HOST", EXIT_BAD_INPUT, field="--url")
        key = os.environ.get("LATENTLINE_API_KEY", "").strip()
        if key and Credential.parse(key) is None:
            fail("LATENTLINE_API_KEY: this is no API key; allowed: ll_..., as latentline keys create shows it", EXIT_BAD_INPUT)
        self.url, self.headers = url, {"Authorization": f"Bearer {key}"} if key else {}
        self._http.headers.update(self.headers)

    def call(self, method: str, path: str, *, or_none: bool = False, **options: Any) -> Any:
        """The JSON that one request is answered with; with ``or_none``, None for what is not found."""
        try:
            response = self._http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fail(f"{self.url} does not answer ({type(error).__name__}); is it running? (--url or LATENTLINE_URL)", EXIT_UNAVAILABLE)
        return None if or_none and response.status_code == 404 else check_answer(self.url, response)

    def find_job(self, job_id: str) -> dict[str, Any] | None:
        """A job; None where there is none that this key may see."""
        job: dict[str, Any] | None = self.call("GET", job_path(job_id), or_none=True)
        if job is not None:
            self._check([job], JOB_FIELDS)
        return job

    def picture(self, job_id: str, number: int) -> bytes:
        """A job's picture, as its file."""
        try:
            return self._http.get(job_path(job_id, f"/images/{number}")).raise_for_status().content
        except httpx.HTTPError as error:
            fail(f"{self.url} does not give image {number} of job {job_id} ({type(error).__name__})", EXIT_UNAVAILABLE)

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


def job_path(job_id: str, rest: str = "") -> str:
    """The path of a job, whatever its id holds."""
    return f"/v1/jobs/{quote(job_id, safe='')}{rest}"


def check_answer(url: str, response: httpx.Response) -> Any:
    """The JSON of an answer, None where it has no body; fails with what the API says is wrong."""
    try:
        data = response.json() if response.status_code != 204 else None
    except ValueError:
        fail(f"{url} is not a latentline API (its answer is no JSON)", EXIT_UNAVAILABLE)
    if response.is_error:
        error = data.get("error") if isinstance(data, dict) else None
        problem = error if isinstance(error, dict) and error.get("message") else {"message": f"status {response.status_code}"}
        more = {name: str(problem[name]) for name in ("field", "allowed") if problem.get(name)}
        code = str(problem["code"]) if problem.get("code") else None
        status = EXIT_UNAVAILABLE if response.status_code >= 500 else status_of(response.status_code)
        fail(str(problem["message"]), status, code, **more)
    return data
