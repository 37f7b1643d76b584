"""Plot the newest speeds of a results file as bars, with the limit as a line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .timing import RESULTS

Row = dict[str, str]
LIMIT, BY_HAND = "limit", "loop by hand"
_COLORS = {"float32": "#4477aa", "bfloat16": "#cc6677", "float16": "#228833"}


def read_newest(path: Path, model: str) -> list[Row]:
    """Return the last row that has a speed, for each method and dtype.

    Raises:
        SystemExit: there is no file, or no row of the model that has a speed.
    """
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run python -m benchmarks sweep first")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["tokens_per_second"]]
    if not rows:
        raise SystemExit(f"{path} has no speed for {model}; run python -m benchmarks sweep --model {model} first")
    return list({(row["way"], row["dtype"]): row for row in rows}.values())


def plot_bars(rows: Sequence[Row]) -> Figure:
    """Plot tokens per second as multiples of the float32 loop by hand, with a line at the limit of each dtype."""
    by_hand = next(
        float(row["tokens_per_second"]) for row in rows if row["way"] == BY_HAND and row["dtype"] == "float32"
    )
    shown = sorted(
        (row for row in rows if row["way"] != LIMIT and row["edits"] == "swap,drop"),
        key=lambda row: float(row["tokens_per_second"]),
    )
    figure, axes = plt.subplots(figsize=(8.5, 0.45 * len(shown) + 1.6), layout="constrained")
    for position, row in enumerate(shown):
        ratio = float(row["tokens_per_second"]) / by_hand
        axes.barh(position, ratio, color=_COLORS[row["dtype"]], height=0.7)
        axes.annotate(f"{ratio:.2f}x", (ratio, position), (4, 0), textcoords="offset points", va="center", fontsize=9)
    for row in rows:
        if row["way"] == LIMIT:
            positions = [position for position, other in enumerate(shown) if other["dtype"] == row["dtype"]]
            limit = float(row["tokens_per_second"]) / by_hand
            axes.vlines(
                limit, min(positions) - 0.45, max(positions) + 0.45, color=_COLORS[row["dtype"]], linestyles="dashed"
            )
            axes.annotate(f"limit, {row['dtype']}", (limit, max(positions) + 0.5), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{row['way']}, {row['dtype']}" for row in shown])
    axes.set_xlabel("speed of swap and drop of every block, as a multiple of the float32 loop by hand")
    axes.margins(x=0.12, y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    axes.set_title(f"{first['model']} on {first['cores']} cores of {first['cpu']}", fontsize=10, loc="left")
    return figure


def save_plot(model: str, name: str = "sweep") -> Path:
    """Plot the newest results of a model, save the plot in `benchmarks/results`, and return its path."""
    path = RESULTS / f"{name}.png"
    figure = plot_bars(read_newest(RESULTS / f"{name}.csv", model))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
