"""LoRA adapters: those that a request may name, and whether files are adapters of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from latentline.terminal import say, say_json

from .errors import EXIT_FAILED
from .extras import load
from .options import json_option, url_option
from .remote import LORA_FIELDS, Api


@click.group()
def loras() -> None:
    """LoRA adapters of the models that workers serve."""


@loras.command("list")
@url_option
@json_option
def list_(url: str, as_json: bool) -> None:
    """List the adapters that a request may name."""
    answer = Api(url).page("/v1/loras", "loras", LORA_FIELDS)
    if as_json:
        say_json(answer)
        return
    for lora in answer["loras"]:
        say(f"{lora['model']}  {lora['name']}")


@loras.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", required=True, help="The bundled model's id, a diffusers folder, or a hub id.")
@click.option("--rank", type=click.IntRange(1, 1024), default=64, show_default=True, help="LATENTLINE_LORA_RANK of the worker.")
@json_option
def check(folder: Path, model: str, rank: int, as_json: bool) -> None:
    """Say of every file in a folder whether a worker of MODEL can use it, and if not, why."""
    found = load("latentline_worker.models.registry", "latentline loras check", "worker").check_adapters(model, folder, rank)
    if as_json:
        say_json(found)
    else:
        for name, problem in found.items():
            say(f"{name}: {problem or 'fine'}")
    sys.exit(EXIT_FAILED if any(found.values()) else 0)
