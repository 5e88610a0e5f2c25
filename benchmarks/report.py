"""Figures as a table, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .runners import Run


def summary(**runs: Run) -> dict[str, Any]:
    """Absolute figures of each way of running."""
    return {
        name: {
            "jobs_per_s": o.throughput(),
            "mean_s": o.mean_s(),
            "p50_s": o.quantile_s(0.5),
            "p99_s": o.quantile_s(0.99),
            "short_mean_s": o.mean_s(short=True),
            "short_p50_s": o.quantile_s(0.5, short=True),
            "short_p99_s": o.quantile_s(0.99, short=True),
            "jobs_per_batch": o.mean_batch_jobs,
            "busy_share": o.busy_s / o.makespan_s,
        }
        for name, o in runs.items()
    }


def rounded(value: Any) -> Any:
    """Round to four significant digits: the measurements are not more precise."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(figures: dict[str, Any]) -> None:
    """Print the absolute figures by load and way, then the ratios."""
    console = Console()
    console.print(figures["machine"])
    table = Table("load", "way", "jobs/s", "mean s", "p50 s", "p99 s", "short p50 s", "jobs a batch", "busy")
    ratios = Table("ratio", "value")
    for load, entry in figures.items():
        if not isinstance(entry, dict):
            if isinstance(entry, float | int):
                ratios.add_row(load, f"{entry:.3g}")
            continue
        for name, value in entry.items():
            if isinstance(value, dict):
                keys = ("jobs_per_s", "mean_s", "p50_s", "p99_s", "short_p50_s", "jobs_per_batch", "busy_share")
                table.add_row(load, name, *(f"{value[key]:.3g}" for key in keys))
            elif isinstance(value, float):
                ratios.add_row(f"{load}.{name}", f"{value:.3f}")
    if table.row_count:
        console.print(table)
    console.print(ratios)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Mean latency by load for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = [name for name, entry in figures.items() if isinstance(entry, dict) and "engine" in entry]
    figure, axes = plt.subplots(1, len(loads), figsize=(3.2 * len(loads), 3.4), layout="constrained", squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        ways = [name for name, value in figures[load].items() if isinstance(value, dict)]
        for offset, key in ((-0.2, "mean_s"), (0.2, "short_p50_s")):
            heights = [figures[load][way][key] for way in ways]
            axis.bar([i + offset for i in range(len(ways))], heights, 0.4, label=key.replace("_s", "").replace("_", " "))
        axis.set_xticks(range(len(ways)), [way.replace("_", " ") for way in ways])
        axis.set_title(load.replace("_", " "))
        axis.set_ylabel("latency in s")
        axis.legend(frameon=False)
    figure.suptitle(figures["machine"], fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
