"""Models: those that workers serve, and the bundled one as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .errors import clear_errors
from .extras import load
from .options import json_option, url_option
from .remote import MODEL_FIELDS, Api


@click.group(invoke_without_command=True)
@url_option
@json_option
@click.pass_context
def models(context: click.Context, url: str, as_json: bool) -> None:
    """List the models that workers serve."""
    if context.invoked_subcommand:
        return
    answer = Api(url).page("/v1/models", "models", MODEL_FIELDS)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for model in answer["models"]:
        click.echo(f"{model['id']}  {model['family']}  {model['default_width']}x{model['default_height']}")


@models.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@clear_errors
def export(folder: Path) -> None:
    """Write the bundled model as a complete diffusers folder."""
    load("latentline_worker.models.bundled_model", "latentline models export", "worker").export(folder)
    click.echo(f"wrote {folder}")
