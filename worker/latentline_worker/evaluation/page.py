"""What an evaluation found, as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ceilings import Reconstruction
from .intervals import Figure
from .measures import Seen
from .probe import SHA256
from .results import MEASURES, Row
from .sets import Distances, Neighbours
from .sweeps import Choice


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found; ``seen`` holds one answer for each test prompt, by seed."""

    source: str
    trial: bool
    num_prompts: tuple[int, int]
    choice: Choice
    seen: list[list[Seen]]
    model: dict[str, Figure]
    ceilings: list[Row]
    reconstructions: list[Reconstruction]
    distances: Distances
    neighbours: dict[str, Neighbours]


def page(found: Findings, layouts: list[Row], shown: list[str]) -> str:
    """The Markdown page; ``shown`` are the prompts of the contact sheets."""
    settings = found.choice.settings
    validation, test = found.num_prompts
    chosen = [f"{name} {getattr(settings, name)} ({found.choice.origin(name)})" for name in ("guidance", "sampler", "steps")]
    parts = [
        f"# Evaluation of {found.source}",
        *(["**A trial on few prompts, not a result.**"] if found.trial else []),
        f"{test} test prompts with seeds 0 to {len(found.seen) - 1}, all of them reported. Settings: {', '.join(chosen)}; choices were "
        f"made on {validation} validation prompts with seed 0. The probe is the frozen one, SHA-256 `{SHA256[:12]}`. Intervals are "
        "95%; the prompt is the unit, whatever the number of its seeds.",
        "## Do pictures show what was asked for?",
        _table([Row(f"**{found.source}**", found.model), *found.ceilings]),
        "R@k: the thing asked for is among the probe's first k answers of "
        "all things of the data set. Object colour: of things that a caption gives one of seven hues. Real renders are the data set's own "
        "pictures of the same prompts: what the measures say of right answers.",
        "By what the prompt asks for:",
        _table(layouts),
        f"The first prompts of each kind, seed 0, in the order of their file:\n\n![Drawn pictures](drawn.webp)\n\n{'; '.join(shown)}.",
        "The data set's own pictures of these prompts:\n\n![Real renders](real.webp)",
        "## Does the model repeat itself?",
        "One row a seed, the same prompts:\n\n![Seeds](seeds.webp)",
        *_sets(found),
        "## What the autoencoder keeps",
        *_reconstruction(found.reconstructions),
        *_sweeps(found.choice),
    ]
    return "\n\n".join(parts) + "\n"


def _sets(found: Findings) -> list[str]:
    d = found.distances
    spread = (
        f"Mean distance between pictures (edges and colours): of one prompt with different seeds {d.seeds.mean:.3f} ({d.seeds.low:.3f} to "
        f"{d.seeds.high:.3f}), of two renders of one prompt {d.renders.mean:.3f}, of different prompts {d.prompts:.3f}."
    )
    kid = "\n".join(
        ["| pictures | kernel distance to real renders |", "|---|---|"]
        + [f"| {name} | {', '.join(f'{value:.4f}' for value in values)} |" for name, values in d.kid.items()]
    )
    near = "\n".join(
        [
            "| single objects of | distance to the nearest training sprite | it is the noun asked for | the style asked for |",
            "|---|---|---|---|",
        ]
        + [
            f"| {name} | {n.distance.mean:.1f} ({n.distance.low:.1f} to {n.distance.high:.1f}) "
            f"| {_share(n.same_noun)} | {_share(n.same_style)} |"
            for name, n in found.neighbours.items()
        ]
    )
    return [
        spread,
        kid,
        "The kernel distance is computed from edges and colours and not from an Inception network: compare these figures "
        "with each other only.",
        near,
        "Distances to sprites are differences of brightness, of 255, with the background removed. The model draws sprites that it was "
        "trained on: what is held out is their combination with colours, backgrounds, places, numbers and each other.",
    ]


def _reconstruction(parts: list[Reconstruction]) -> list[str]:
    lines = ["| pictures that were never trained on | number | PSNR, mean per picture (95%) | worst |", "|---|---|---|---|"]
    for part in parts:
        p = part.psnr_db
        lines.append(f"| {part.name} | {p.num} | {p.mean:.1f} dB ({p.low:.1f} to {p.high:.1f}) | {part.worst_db:.1f} |")
    return [
        "\n".join(lines),
        "No perceptual distance (LPIPS) is measured. Each picture beside its reconstruction:\n\n![Reconstructed](reconstructed.webp)",
    ]


def _sweeps(choice: Choice) -> list[str]:
    if not choice.sweeps:
        return []
    made = [
        "## How the settings were chosen",
        "On the validation prompts, one setting after the other; the highest R@5, and the fewest steps within a point of it.",
    ]
    for name, points in choice.sweeps.items():
        made.append(f"![Sweep over {name}](sweep-{name}.png)")
        made.append(_table([Row(str(getattr(point.settings, name)), point.figures) for point in points], name))
    return made


def _table(rows: Sequence[Row], first: str = "pictures") -> str:
    names = [name for name in MEASURES if any(name in row.figures for row in rows)]
    lines = [f"| {first} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row.name} | {' | '.join(_share(row.figures[name]) if name in row.figures else '' for name in names)} |")
    return "\n".join(lines)


def _share(figure: Figure) -> str:
    return f"{100 * figure.mean:.1f}% ({100 * figure.low:.1f} to {100 * figure.high:.1f})"
