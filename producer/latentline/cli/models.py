"""Models: those that workers serve, the file that names those of a worker, and the bundled one as a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from latentline.terminal import say, say_json, say_json_line

from .errors import EXIT_FAILED
from .extras import load
from .options import json_option, url_option
from .remote import MODEL_FIELDS, Api

Command = Callable[..., None]


@click.group(invoke_without_command=True)
@url_option
@json_option
@click.pass_context
def models(context: click.Context, url: str, as_json: bool) -> None:
    """List the models that workers serve; the commands are about the file that names those of a worker."""
    if not context.invoked_subcommand:
        list_served(url, as_json)


def list_served(url: str, as_json: bool) -> None:
    """Write the models that workers serve, those too that no worker has in memory."""
    answer = Api(url).page("/v1/models", "models", MODEL_FIELDS)
    if as_json:
        say_json(answer)
        return
    for model in answer["models"]:
        where = f"  in memory of {model['warm']} of {model['workers']} workers, {model['swaps']} swaps" if "warm" in model else ""
        say(f"{model['id']}  {model['family']}  {model['default_width']}x{model['default_height']}{where}")


def file_option(*, required: bool = True) -> Callable[[Command], Command]:
    return click.option(
        "--models", "path", envvar="LATENTLINE_MODELS", required=required, type=click.Path(path_type=Path, dir_okay=False),
        help="The TOML file that names a worker's models.",
    )  # fmt: skip


@models.command("list")
@file_option(required=False)
@url_option
@json_option
def list_(path: Path | None, url: str, as_json: bool) -> None:
    """List the models of a worker's file; nothing is loaded. Without a file, those that workers serve."""
    if path is None:
        list_served(url, as_json)
        return
    entries = list(_commands("list").describe(path))
    if as_json:
        say_json({"models": entries})
        return
    for entry in entries:
        defaults = "".join(f"  {name}={value}" for name, value in entry["defaults"].items())
        say(f"{entry['id']}  {entry['source']}{defaults}")


@models.command()
@file_option()
@json_option
def check(path: Path, as_json: bool) -> None:
    """Load the files of every model of a worker's file, without a GPU, and say what is wrong."""
    fine = True
    for found in _commands("check").check(path):
        fine = fine and found["fine"]
        if as_json:
            say_json_line(found)
        else:
            say(f"{found['id']}: {'fine: ' if found['fine'] else ''}{found['says']}")
    if not fine:
        sys.exit(EXIT_FAILED)


@models.command()
@click.argument("source")
@file_option()
@click.option("--id", help="Under which jobs request it.")
@click.option("--config", help="Of a .safetensors file: folder or hub id of its configurations and tokenizers.")
@click.option("--revision", help="Of a hub id: a commit, tag or branch.")
@click.option("--dtype", help="auto, float32, float16 or bfloat16.")
@click.option("--lora-dir", help="A folder of LoRA adapters that jobs may name.")
@click.option("--scheduler", help="The default of requests that name none; so with the options that follow.")
@click.option("--num-inference-steps", type=int)
@click.option("--guidance-scale", type=float)
@click.option("--width", type=int)
@click.option("--height", type=int)
@json_option
def add(source: str, path: Path, as_json: bool, **given: Any) -> None:
    """Append a model to a worker's file, once its files were loaded without error.

    SOURCE is a folder in diffusers' format, a .safetensors file or a hub id.
    """
    given = {name: value for name, value in given.items() if value is not None}
    names = ("scheduler", "num_inference_steps", "guidance_scale", "width", "height")
    defaults = {name: given.pop(name) for name in names if name in given}
    added = _commands("add").add(path, {"source": source, **given, "defaults": defaults})
    if as_json:
        say_json(added)
    else:
        say(f"{added['id']}: added to {path}: {added['says']}")


def _commands(name: str) -> Any:
    return load("latentline_worker.models.commands", f"latentline models {name}", "worker")


@models.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@json_option
def export(folder: Path, as_json: bool) -> None:
    """Write the bundled model as a complete diffusers folder."""
    load("latentline_worker.models.bundled_model", "latentline models export", "worker").export(folder)
    if as_json:
        say_json({"folder": str(folder)})
    else:
        say(f"wrote {folder}")
