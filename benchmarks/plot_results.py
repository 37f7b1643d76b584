"""Bars of speed with the limit drawn in, from the newest rows of a file of results."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .timing import RESULTS

Row = dict[str, str]
LIMIT, BY_HAND = "limit", "loop by hand"
_COLOURS = {"float32": "#4477aa", "bfloat16": "#cc6677", "float16": "#228833"}


def newest(path: Path, model: str) -> list[Row]:
    """For each way and dtype the last row that has a speed.

    Raises:
        SystemExit: there is none.
    """
    if not path.exists():
        raise SystemExit(f"there is no {path}: run python -m benchmarks sweep first")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["tokens_per_second"]]
    if not rows:
        raise SystemExit(f"{path} has no speed for {model}")
    return list({(row["way"], row["dtype"]): row for row in rows}.values())


def bars(rows: Sequence[Row]) -> Figure:
    """Tokens a second of each way as a multiple of the float32 loop by hand; the limit of each dtype is a line over its bars."""
    yard = next(float(row["tokens_per_second"]) for row in rows if row["way"] == BY_HAND and row["dtype"] == "float32")
    shown = sorted(
        (row for row in rows if row["way"] != LIMIT and row["edits"] == "swap,drop"),
        key=lambda row: float(row["tokens_per_second"]),
    )
    figure, axes = plt.subplots(figsize=(8.5, 0.45 * len(shown) + 1.6), layout="constrained")
    for place, row in enumerate(shown):
        times = float(row["tokens_per_second"]) / yard
        axes.barh(place, times, color=_COLOURS[row["dtype"]], height=0.7)
        axes.annotate(f"{times:.2f}x", (times, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    for row in rows:
        if row["way"] == LIMIT:
            places = [place for place, other in enumerate(shown) if other["dtype"] == row["dtype"]]
            limit = float(row["tokens_per_second"]) / yard
            axes.vlines(
                limit, min(places) - 0.45, max(places) + 0.45, color=_COLOURS[row["dtype"]], linestyles="dashed"
            )
            axes.annotate(f"limit, {row['dtype']}", (limit, max(places) + 0.5), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{row['way']}, {row['dtype']}" for row in shown])
    axes.set_xlabel("speed of swap and drop of every block, as a multiple of the float32 loop by hand")
    axes.margins(x=0.12, y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    some = rows[0]
    axes.set_title(f"{some['model']} on {some['cores']} cores of {some['cpu']}", fontsize=10, loc="left")
    return figure


def draw(model: str, name: str = "sweep") -> Path:
    """Draw the newest results of a model into `benchmarks/results`."""
    path = RESULTS / f"{name}.png"
    figure = bars(newest(RESULTS / f"{name}.csv", model))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
