"""Dialects that other services' clients speak, each an application of its own under its prefix, over the one job service."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from latentline.settings import Settings

from . import a1111, openai, replicate

DIALECTS: dict[str, Callable[[State, Settings], FastAPI]] = {
    "/openai/v1": openai.create,
    "/replicate/v1": replicate.create,
    "/sdapi/v1": a1111.create,
}
"""Where each dialect stands, and what makes its application: it gets the state that all of them share, and the settings."""


def mount_dialects(app: FastAPI, settings: Settings) -> None:
    for prefix, create in DIALECTS.items():
        app.mount(prefix, create(app.state, settings))
        mount: Any = app.routes[-1]
        mount.path_regex = re.compile(mount.path_regex.pattern, re.DOTALL)  # a path with a line end in it is this dialect's to answer
