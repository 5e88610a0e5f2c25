"""The page of ``benchmarks.latent_vs_pixel``: a table of costs, a table and a plot of quality, contact sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

MEASURES = ("R@1", "R@5", "background", "object colour")


def write_page(page: Path, figures: dict[str, Any], out: Path) -> None:
    """Write the Markdown page, and beside it its plot and a sheet for each side."""
    page.parent.mkdir(parents=True, exist_ok=True)
    _plot(page.with_name(f"{page.stem}-steps.png"), figures)
    sheets = []
    for side in figures["sides"]:
        name = side["name"].replace(", ", "-").replace(" ", "-")
        sheet = page.with_name(f"{page.stem}-{name}.webp")
        with Image.open(out / name / "drawn-20.png") as image:
            image.save(sheet, quality=85)
        sheets.append(f"{side['name']}, 20 steps:\n\n![{side['name']}]({sheet.name})")
    page.write_text("\n\n".join([*_text(figures), f"![Quality by steps]({page.stem}-steps.png)", *sheets]) + "\n")


def _text(figures: dict[str, Any]) -> list[str]:
    sides = figures["sides"]
    latent, pixel = sides[0], sides[-1]
    ratio = {key: pixel[key] / latent[key] for key in ("values", "forward_gflop", "train_step_s", "guided_step_s", "activations_mib")}
    return [
        "# Latents against pixels",
        f"Written by `python -m benchmarks.latent_vs_pixel`: {figures['minutes']:g} CPU-minutes of training a side on "
        f"{figures['machine']}, batch {figures['batch']}, the same {figures['num_items']} sprites and the same four pictures of each. "
        "The pixel U-Net is the latent one with three more levels above it, so both have the same core on 16x16 positions. Quote "
        "ratios: times vary between machines.",
        "## Cost",
        _costs(sides),
        f"A sample in pixels has {ratio['values']:.0f} times the values; a pass of the network takes "
        f"{ratio['forward_gflop']:.1f} times the operations, a training step {ratio['train_step_s']:.1f} times the CPU time, a guided "
        f"step {ratio['guided_step_s']:.1f} times, and the backward pass keeps {ratio['activations_mib']:.1f} times the memory. Not in "
        "these minutes: the pictures are encoded once (the table's last row), and the autoencoder was trained before, in about half "
        "an hour of CPU time.",
        "## Quality",
        f"{figures['num_prompts']} validation prompts, one seed each, guidance {figures['guidance']:g}, measured as "
        "[training.md](training.md) says of the evaluation. After so short a training no side draws well: what counts is which is further.",
        _quality(figures),
        "## Rectified flow against v-prediction",
        "The two latent sides, by the number of steps:",
    ]


def _costs(sides: list[dict[str, Any]]) -> str:
    rows = {
        "values in a sample": ("values", "{:,}"),
        "parameters": ("parameters", "{:,}"),
        "GFLOP in a pass of one row": ("forward_gflop", "{:.2f}"),
        "CPU-seconds of a training step": ("train_step_s", "{:.2f}"),
        "CPU-seconds of a guided step of one picture": ("guided_step_s", "{:.3f}"),
        "MiB of weights, gradients, moments, average": ("weights_mib", "{:.0f}"),
        "MiB kept for the backward pass": ("activations_mib", "{:.0f}"),
        "training steps": ("steps", "{:,}"),
        "CPU-minutes of training, measured": ("cpu_minutes", "{:.1f}"),
        "CPU-minutes for rendering and encoding the pictures": ("encoding_minutes", "{:.1f}"),
    }
    lines = [f"| | {' | '.join(side['name'] for side in sides)} |", "|---" * (len(sides) + 1) + "|"]
    for title, (key, form) in rows.items():
        lines.append(f"| {title} | {' | '.join(form.format(side[key]) for side in sides)} |")
    return "\n".join(lines)


def _quality(figures: dict[str, Any]) -> str:
    lines = [f"| | steps | {' | '.join(MEASURES)} | kernel distance |", "|---" * (len(MEASURES) + 3) + "|"]
    for side in figures["sides"]:
        for steps, found in side["quality"].items():
            lines.append(
                f"| {side['name']} | {steps} | {' | '.join(_share(found, m) for m in MEASURES)} | {found['kernel_distance']:.2f} |"
            )
    lines.append(f"| real renders | | {' | '.join(_share(figures['real'], m) for m in MEASURES)} | 0 |")
    return "\n".join(lines)


def _share(found: dict[str, Any], measure: str) -> str:
    if measure not in found:
        return ""
    figure = found[measure]
    return f"{100 * figure['mean']:.0f}% ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"


def _plot(path: Path, figures: dict[str, Any]) -> None:
    """Background, R@5 and kernel distance by steps, one line for each side (a point where there is one number of steps)."""
    canvas = Figure(figsize=(10, 3.4), layout="constrained")
    for place, measure in enumerate(("background", "R@5", "kernel_distance"), 1):
        axes = canvas.add_subplot(1, 3, place)
        for side in figures["sides"]:
            steps = [int(n) for n in side["quality"]]
            values = [found[measure] if measure == "kernel_distance" else found[measure]["mean"] for found in side["quality"].values()]
            axes.plot(steps, values, marker="o", label=side["name"])
        axes.set_xscale("log")
        axes.set_xticks([4, 8, 20, 50], ["4", "8", "20", "50"])
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.set_title(measure.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    canvas.savefig(path, dpi=110)
