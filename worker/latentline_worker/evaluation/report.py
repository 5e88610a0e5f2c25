"""The report's files: the page with its pictures, and the same figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .foreground import Pixels
from .page import Findings, page
from .plots import contact_sheet, plot_sweep
from .probe import SHA256
from .prompts import Prompt
from .results import Row, by_layout

PAGE, FIGURES = "report.md", "report.json"


@dataclass(frozen=True)
class Sheets:
    """The pictures of the page; ``drawn`` and ``real`` are of ``prompts`` in their order."""

    drawn: Pixels
    real: Pixels
    seeds: Pixels
    reconstructed: Pixels
    prompts: list[str]


def write(out: Path, found: Findings, sheets: Sheets, prompts: list[Prompt]) -> None:
    """Write page, figures, plots and contact sheets into ``out``.

    Raises:
        OSError: something cannot be written.
    """
    for name, points in found.choice.sweeps.items():
        plot_sweep(out / f"sweep-{name}.png", name, points)
    contact_sheet(out / "drawn.webp", sheets.drawn)
    contact_sheet(out / "real.webp", sheets.real)
    contact_sheet(out / "seeds.webp", sheets.seeds, columns=max(1, len(sheets.seeds) // len(found.seen)))
    contact_sheet(out / "reconstructed.webp", sheets.reconstructed)
    layouts = by_layout(prompts, found.seen)
    (out / FIGURES).write_text(json.dumps(_figures(found, layouts), indent=2) + "\n")
    (out / PAGE).write_text(page(found, layouts, sheets.prompts))


def _figures(found: Findings, layouts: list[Row]) -> dict[str, Any]:
    def rows(many: Sequence[Row]) -> dict[str, Any]:
        return {row.name: {name: figure.to_json() for name, figure in row.figures.items()} for row in many}

    settings = found.choice.settings
    sweeps = {
        name: rows([Row(str(getattr(point.settings, name)), point.figures) for point in points])
        for name, points in found.choice.sweeps.items()
    }
    return {
        "model": found.source,
        "trial": found.trial,
        "probe_sha256": SHA256,
        "num_prompts": dict(zip(("validation", "test"), found.num_prompts, strict=True)),
        "num_seeds": len(found.seen),
        "settings": {
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "given": list(found.choice.given),
        },
        "measures": rows([Row("model", found.model), *found.ceilings]),
        "by_layout": rows(layouts),
        "kernel_distance": found.distances.kid,
        "spread": {
            "seeds": found.distances.seeds.to_json(),
            "renders": found.distances.renders.to_json(),
            "prompts": found.distances.prompts,
        },
        "nearest_sprite": {
            name: {"distance": n.distance.to_json(), "same_noun": n.same_noun.to_json(), "same_style": n.same_style.to_json()}
            for name, n in found.neighbours.items()
        },
        "psnr_db": {part.name: part.psnr_db.to_json() | {"worst": part.worst_db} for part in found.reconstructions},
        "sweeps": sweeps,
    }
