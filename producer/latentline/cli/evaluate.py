"""Evaluation: what a model draws, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentline.terminal import note

from .extras import load

folder = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("model")
@click.option("--data", required=True, type=folder, help="The data set of `latentline train data`.")
@click.option("--out", required=True, type=folder, help="Report and pictures; given again, what is there is kept.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale; chosen on the validation prompts when not given.")
@click.option("--sampler", help="Sampler; chosen likewise.")
@click.option("--steps", type=click.IntRange(1), help="Steps; chosen likewise.")
@click.option("--prompts", "limit", type=click.IntRange(4), help="So many prompts of each split: a trial, not a result.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
@click.option("--device", help="Device of torch; default: a GPU where there is one.")
def evaluate(model: str, data: Path, out: Path, limit: int | None, threads: int | None, device: str | None, **settings: Any) -> None:
    """Measure MODEL, a diffusers folder or the bundled model's id, on held-out prompts; Markdown with pictures, and JSON."""
    commands = load("latentline_worker.evaluation.commands", "latentline evaluate", "worker,evaluation")
    given = {name: value for name, value in settings.items() if value is not None}
    commands.evaluate(model, data, out, commands.Options(given, limit, threads, device), note)
