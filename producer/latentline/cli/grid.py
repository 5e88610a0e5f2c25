"""A grid of pictures that differ in one or two assumptions alone, as one labelled sheet."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from latentline.errors import InvalidRequest
from latentline.jobs import ModelInfo
from latentline.terminal import note, say, say_json

from .axes import Axis, Cell, cells, check_models, lora_of
from .errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNAVAILABLE, Failed, fail
from .extras import load
from .options import json_option, url_option
from .pictures import check_output
from .remote import MODEL_FIELDS, Api, job_path

WAIT_S, POLL_S = 5.0, 0.2  # of one long poll, and between two
SAID = ("model", "scheduler", "num_inference_steps", "guidance_scale", "negative_prompt")  # below the prompt, where all pictures share it


@click.command()
@click.argument("prompt")
@click.option("--x", required=True, metavar="FIELD=V,V", help="Columns: num_inference_steps=8,16,32")
@click.option("--y", metavar="FIELD=V,V", help="Rows: scheduler=euler,ddim")
@click.option("--model")
@click.option("--negative-prompt")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", "num_inference_steps", type=int)
@click.option("--guidance", "guidance_scale", type=float)
@click.option("--scheduler")
@click.option("--lora", "loras", multiple=True, metavar="NAME[:SCALE]")
@click.option("--seed", type=int, help="Of every picture; drawn once if left out.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds to wait for all of them.",
)
@click.option("-o", "output", type=click.Path(path_type=Path), default=Path("grid.png"), show_default=True, help="The sheet, a .png file.")
@url_option
@json_option
def grid(
    prompt: str, x: str, y: str | None, loras: tuple[str, ...], seed: int | None, timeout_s: float, output: Path, url: str, as_json: bool,
    **fields: Any,
) -> None:  # fmt: skip
    """Make a grid of pictures with one seed, as one labelled sheet.

    FIELD is guidance_scale, height, lora (NAME:SCALE or none), model, num_inference_steps, scheduler or width.
    """
    sheet = load("latentline.cli.sheet", "latentline grid", "pictures")
    if output.suffix.lower() != ".png" or output.is_dir():
        raise InvalidRequest("-o", str(output), "a .png file")
    body = {"prompt": prompt, "seed": secrets.randbelow(2**31) if seed is None else seed, "num_images": 1}
    body |= {name: value for name, value in fields.items() if value is not None}
    if loras:
        body["loras"] = [lora_of(text, "--lora") for text in loras]
    columns, rows = Axis.parse("--x", x), Axis.parse("--y", y) if y else None
    wanted = cells(body, columns, rows)
    api = Api(url)
    check_models(wanted, _served(api))
    check_output(output)
    jobs = _ended(api, _submitted(api, wanted), timeout_s)
    data = sheet.draw(_sheet(api, sheet, body, columns, rows, wanted, jobs))
    try:
        output.write_bytes(data)
    except OSError as error:
        fail(f"-o: {output} cannot be written: {error.strerror}", EXIT_BAD_INPUT)
    if as_json:
        listed = [_listed(cell, job, columns, rows) for cell, job in zip(wanted, jobs, strict=True)]
        say_json({"file": str(output), "seed": body["seed"], "jobs": listed})
    else:
        say(f"wrote {output}: {len(jobs)} pictures, seed {body['seed']}")
    if any(job["status"] != "succeeded" for job in jobs):
        sys.exit(EXIT_FAILED)


def _served(api: Api) -> list[ModelInfo]:
    answer = api.page("/v1/models", "models", MODEL_FIELDS)
    try:
        return [ModelInfo.model_validate(one) for one in answer["models"]]
    except ValidationError:
        fail(f"{api.url} is not a latentline API (its answer has another form)", EXIT_UNAVAILABLE)


def _submitted(api: Api, wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """Submit all; where one is refused, those before it are cancelled."""
    jobs: list[dict[str, Any]] = []
    try:
        for cell in wanted:
            jobs.append(api.job("POST", "/v1/jobs", json=cell.body))
    except Failed:
        for job in jobs:
            with contextlib.suppress(Failed):
                api.call("POST", job_path(job["id"], "/cancel"))
        raise
    return jobs


def _ended(api: Api, jobs: Sequence[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    """The jobs once they have ended, with a progress bar on a terminal. Ctrl-C and a time-out end the command, and the jobs go on."""
    deadline = time.monotonic() + timeout_s

    def waited() -> Iterator[dict[str, Any]]:
        for job in jobs:
            while job["status"] in ("queued", "running"):
                if time.monotonic() > deadline:
                    fail(f"the grid has not ended within {timeout_s:g} s; its jobs go on", EXIT_FAILED, "wait_timeout")
                job = api.job("GET", job_path(job["id"]), params={"wait": WAIT_S})
                time.sleep(POLL_S)
            yield job

    console = Console(stderr=True)
    try:
        return list(track(waited(), "grid", total=len(jobs), console=console, transient=True, disable=not console.is_terminal))
    except KeyboardInterrupt:
        note("jobs: " + " ".join(job["id"] for job in jobs))
        fail("interrupted; the jobs of the grid go on", EXIT_INTERRUPTED)


def _listed(cell: Cell, job: dict[str, Any], x: Axis, y: Axis | None) -> dict[str, Any]:
    values = {x.field: x.labels[cell.column]} | ({y.field: y.labels[cell.row]} if y else {})
    return {"id": job["id"], "status": job["status"], "error": job["error"], **values}


def _sheet(
    api: Api, module: Any, body: dict[str, Any], x: Axis, y: Axis | None, wanted: Sequence[Cell], jobs: Sequence[dict[str, Any]]
) -> Any:
    """What is drawn of the jobs."""
    pictures: dict[tuple[int, int], Any] = {}
    for cell, job in zip(wanted, jobs, strict=True):
        if job["status"] == "succeeded":
            pictures[cell.column, cell.row] = module.opened(api.picture(job["id"], 0), job["id"])
        else:
            pictures[cell.column, cell.row] = job["error"]["code"] if job["error"] else job["status"]
    used = jobs[0]["request"]
    axes = {axis.field for axis in (x, y) if axis}
    same = [f"{name} {used[name]}" for name in SAID if name not in axes and used.get(name) not in (None, "")]
    return module.Sheet(
        title=body["prompt"],
        subtitle=", ".join([f"seed {body['seed']}", *same]),
        columns=[f"{x.field} {label}" for label in x.labels],
        rows=[f"{y.field} {label}" for label in y.labels] if y else [],
        pictures=pictures,
        facts={"prompt": body["prompt"], "seed": body["seed"], "axes": sorted(axes), "jobs": [job["id"] for job in jobs]},
    )
