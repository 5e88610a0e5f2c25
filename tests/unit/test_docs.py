"""The architecture page draws the tree that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


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


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_every_relative_link_of_the_docs_leads_to_a_file(page: Path) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
