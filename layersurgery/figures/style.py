"""How figures look, and how they become files.

Colours are those of Okabe and Ito, which the colour-blind tell apart; lines differ in their markers as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..atomic_io import atomic_file

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.hashsalt": "layersurgery",  # the same figure, the same bytes
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True)
class ModelTables:
    """A model's tables to draw.

    Attributes:
        tables: by the names of analyses.
        label: the model's name.
        caption: what it was measured on.
    """

    tables: Mapping[str, pd.DataFrame]
    label: str
    caption: str


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write figures as PNG and SVG; returns the files."""
    written = []
    for name, figure in figures.items():
        with matplotlib.rc_context(_STYLE):  # find places for all once, and not for each format again
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for kind, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
            path = directory / f"{name}.{kind}"
            with atomic_file(path) as partial, matplotlib.rc_context(_STYLE):
                figure.savefig(partial, format=kind, bbox_inches="tight", **options)
            written.append(path)
    return written


def disable_mathtext(texts: Sequence[Text]) -> None:
    """Names of models, files and plans may hold a dollar, and mean no formula."""
    for text in texts:
        text.set_parse_math(False)


def line(axis: Axes, x: Any, y: Any, error: Any, place: int, label: str, **style: Any) -> None:
    """A line with its band of one error to each side."""
    x, y, error = (np.asarray(values, float) for values in (x, y, error))
    if not np.isfinite(y).any():  # no line, no legend
        return
    colour = COLORS[place % len(COLORS)]
    axis.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, y, **{"color": colour, "marker": MARKERS[place % len(MARKERS)], "label": label} | style)


def add_title_and_legend(figure: Figure, models: Sequence[ModelTables], axis: Axes, *, legend: bool = True) -> None:
    """Say whose figure it is, and on what it was measured."""
    if len(models) > 1 and legend:
        names = figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(models)))
        disable_mathtext(names.get_texts())
    captions = list(dict.fromkeys(model.caption for model in models))
    if len(models) == 1:
        text = f"{models[0].label}: {captions[0]}"
    else:
        text = captions[0] if len(captions) == 1 else "; ".join(f"{model.label}: {model.caption}" for model in models)
    figure.suptitle(text, fontsize=10 if len(text) < 120 else 7, parse_math=False)
