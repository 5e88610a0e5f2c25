"""Plots of the sweeps and contact sheets."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure as Canvas
from PIL import Image

from latentline_worker.training.sheets import save_sheet

from .foreground import Pixels
from .sweeps import Point

COLUMNS = 8
SHOWN = ("R@1", "R@5", "background", "object colour", "count", "order of two")


def plot_sweep(path: Path, name: str, points: list[Point]) -> None:
    """Each measure against the setting ``name``, with its interval."""
    canvas = Canvas(figsize=(7, 4.2), layout="constrained")
    axes = canvas.add_subplot()
    values = [getattr(point.settings, name) for point in points]
    places = range(len(values))
    for measure in SHOWN:
        found = [point.figures[measure] for point in points if measure in point.figures]
        if len(found) == len(points):
            errors = [[f.mean - f.low for f in found], [f.high - f.mean for f in found]]
            axes.errorbar(places, [f.mean for f in found], yerr=errors, label=measure, marker="o", capsize=3, linewidth=1.5)
    axes.set_xticks(list(places), [str(value) for value in values])
    axes.set_xlabel(name)
    axes.set_ylabel("share of the validation prompts")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    canvas.savefig(path, dpi=110)


def contact_sheet(path: Path, pictures: Pixels, columns: int = COLUMNS) -> None:
    """(n, size, size, 3) as a grid, in their order."""
    save_sheet(path, [Image.fromarray(pixels) for pixels in pictures], columns)
