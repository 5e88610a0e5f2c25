"""The ``latentline`` command: one file per group of commands.

Commands about jobs go over HTTP, so they work wherever the API is reachable. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import click

from .callbacks import callbacks
from .dead import dead
from .errors import Commands
from .evaluate import evaluate
from .grid import grid
from .jobs import cancel, delete, status, submit
from .keys import keys
from .listing import jobs
from .loras import loras
from .mcp import mcp
from .models import models
from .secrets import secrets
from .serve import api, demo, up, worker
from .timeline import timeline
from .train import train
from .verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="latentline")
def main() -> None:
    """Generation jobs for latent diffusion.

    Exit statuses: 0 done; 1 done, with a bad end; 2 wrong input, the same again fails again; 3 a service does not answer or takes
    nothing now; 130 interrupted. Errors are one line on stderr, a JSON object with --json.
    """


for command in (
    submit, grid, status, timeline, verify, cancel, delete, jobs, models, loras,
    api, mcp, worker, callbacks, keys, secrets, dead, up, demo, train, evaluate,
):  # fmt: skip
    main.add_command(command)
