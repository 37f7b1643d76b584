"""Set the style of figures, and write them to files.

The colors are those of Okabe and Ito, which color-blind readers can distinguish. Lines also differ in their markers.
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
    "svg.hashsalt": "layersurgery",  # so that the same figure gives the same bytes
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True)
class ModelTables:
    """Tables of one model to draw.

    Attributes:
        tables: tables by the names of analyses.
        label: name of the model.
        caption: the text that it was measured on.
    """

    tables: Mapping[str, pd.DataFrame]
    label: str
    caption: str


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Create a figure with a size in inches."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write figures as PNG and SVG, and return the files."""
    written = []
    for name, figure in figures.items():
        with matplotlib.rc_context(_STYLE):  # compute the layout once, not once for each format
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for kind, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
            path = directory / f"{name}.{kind}"
            with atomic_file(path) as partial, matplotlib.rc_context(_STYLE):
                figure.savefig(partial, format=kind, bbox_inches="tight", **options)
            written.append(path)
    return written


def disable_mathtext(texts: Sequence[Text]) -> None:
    """Draw texts literally: names of models, files and plans may contain a dollar sign."""
    for text in texts:
        text.set_parse_math(False)


def line(axis: Axes, x: Any, y: Any, error: Any, index: int, label: str, **style: Any) -> None:
    """Draw a line with a band of one standard error to each side."""
    x, y, error = (np.asarray(values, float) for values in (x, y, error))
    if not np.isfinite(y).any():  # neither a line nor a legend entry
        return
    color = COLORS[index % len(COLORS)]
    axis.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, y, **{"color": color, "marker": MARKERS[index % len(MARKERS)], "label": label} | style)


def add_title_and_legend(figure: Figure, models: Sequence[ModelTables], axis: Axes, *, legend: bool = True) -> None:
    """Add a title with the model and its text, and a legend of several models."""
    if len(models) > 1 and legend:
        box = figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(models)))
        disable_mathtext(box.get_texts())
    captions = list(dict.fromkeys(model.caption for model in models))
    if len(models) == 1:
        text = f"{models[0].label}: {captions[0]}"
    else:
        text = captions[0] if len(captions) == 1 else "; ".join(f"{model.label}: {model.caption}" for model in models)
    figure.suptitle(text, fontsize=10 if len(text) < 120 else 7, parse_math=False)
