"""The architecture page draws the tree that is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from latentline.cli import main
from latentline_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def drawn(root: str) -> set[str]:
    """Names of rooms (with a slash) and modules that the page draws under one source root."""
    block = PAGE.split("## The tree")[1].split("```")[1]
    part = block.split(root)[1].split("\nworker/")[0]
    return {name for line in part.splitlines()[1:] for name in re.findall(r"^  (\S+)", line)}


@pytest.mark.parametrize("root", ["producer/latentline/", "worker/latentline_worker/"])
def test_the_tree_on_the_architecture_page_has_every_room_and_no_other(root: str) -> None:
    rooms = {f"{path.parent.name}/" for path in (ROOT / root).glob("*/__init__.py")}
    assert {name for name in drawn(root) if name.endswith("/")} == rooms


@pytest.mark.parametrize("root", ["producer/latentline/", "worker/latentline_worker/"])
def test_modules_that_the_architecture_page_names_are_there(root: str) -> None:
    assert [name for name in drawn(root) if not (ROOT / root / name).exists()] == []


def test_the_operators_guide_has_every_setting() -> None:
    table = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    names = [name.lower() for row in table for name in re.findall("`([A-Z0-9_]+)`", row)]
    assert sorted(name for name in names if not name.startswith("otel_")) == sorted(WorkerSettings.model_fields)


def commands(page: Path) -> Iterator[str]:
    """The commands of latentline in a page's blocks of code, without comments."""
    for block in re.findall(r"```(?:sh)?\n(.*?)```", page.read_text(), re.DOTALL):
        yield from re.findall(r"^(latentline .*?) *(?:#.*)?$", block.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_every_command_of_the_docs_is_one(command: str) -> None:
    name, *args = shlex.split(command)
    found: click.Command = main
    while isinstance(found, click.Group):
        name = args.pop(0)
        found = found.commands[name]
    try:
        found.make_context(name, args)  # raises for an option that does not exist, and for a value or an argument that is missing
    except click.MissingParameter:
        assert "..." in command  # where the rest is written elsewhere
    except click.BadParameter as error:
        assert "does not exist" in error.message  # a file of the reader


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_the_docs_leads_to_a_file(page: Path) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
