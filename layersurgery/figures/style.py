"""Set the style of figures, and write them to files.

The colors are those of Okabe and Ito, which color-blind readers can distinguish. Lines also differ in their markers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter, StrMethodFormatter

from ..atomic_io import atomic_file
from ..registry import Column

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BAND = "_one standard error"  # legends leave out labels that begin with an underscore
_MOST_LABELED = 2000  # ratio of the ends of an axis that is labelled within powers of ten
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
    """Create a figure with a size in inches; the end of the `with` block labels its logarithmic axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for axis in figure.axes:
            _label_decades(axis)


def _label_decades(axis: Axes) -> None:
    """Label a logarithmic axis with plain numbers, and with more than powers of ten if there would be one or two."""
    if not isinstance(axis.yaxis.get_major_formatter(), LogFormatterSciNotation):
        return
    low, high = axis.get_ylim()
    if low > 0 and high < _MOST_LABELED * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


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
    if np.nanmax(error, initial=0) > 0:
        axis.fill_between(x, y - error, y + error, color=color, alpha=0.2, linewidth=0, label=_BAND)
    axis.plot(x, y, **{"color": color, "marker": MARKERS[index % len(MARKERS)], "label": label} | style)


def label_axis(axis: Axes, column: Column, width: int = 34, **style: Any) -> None:
    """Label the vertical axis with what a column is, in lines of at most `width` characters, and set its limits.

    A share in percent is drawn from 0 to 100, and a change with a line at zero. Call it after the lines are drawn.
    """
    axis.set_ylabel(fill(column.axis, width), **style)
    if column.unit == "%" and column.factor == 100:
        axis.set_ylim(0, 102)
    if column.signed:
        axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)


def label_depth(axis: Axes, tables: Sequence[pd.DataFrame], of: str, most: int = 8, **style: Any) -> None:
    """Label the horizontal axis, which is relative depth, with the numbers of the blocks if all models have the same.

    Args:
        axis: the axis.
        tables: tables that are drawn, with columns layer and relative_depth.
        of: what has the depth: "block".
        most: number of labels that there is room for.
        style: style of the axis's label.
    """
    depths = {_last_block(table) for table in tables if len(table)}
    last = depths.pop() if len(depths) == 1 else None
    if last is None:
        axis.set_xlabel(f"relative depth of the {of}", **style)
        return
    blocks = labeled_blocks(last, most)
    axis.set_xticks([block / last for block in blocks], [f"{block}\n{round(block / last, 2):g}" for block in blocks])
    axis.set_xticks([block / last for block in range(last + 1)], minor=True)
    axis.set_xlabel(f"{of} (below: relative depth)", **style)


def _last_block(table: pd.DataFrame) -> int | None:
    """Return the number of a model's last block; None if the table has only its first."""
    row = table.loc[table.relative_depth.astype(float).idxmax()]
    return round(float(row.layer) / float(row.relative_depth)) if row.relative_depth > 0 else None


def labeled_blocks(last: int, most: int, first: int = 0) -> list[int]:
    """Choose the blocks to label, at most `most` of `first` to `last`: the first, multiples of a step, and the last.

    Example:
        >>> from layersurgery.figures.style import labeled_blocks
        >>> labeled_blocks(29, 8), labeled_blocks(79, 8), labeled_blocks(18, 8, 4)
        ([0, 5, 10, 15, 20, 25, 29], [0, 20, 40, 60, 79], [4, 10, 15, 18])
    """
    steps = (scale * step for scale in (1, 10, 100, 1000) for step in (1, 2, 5))
    step = next(step for step in steps if (last - first) // step + 1 < most)
    # The first and the last label replace those that they would touch.
    between = range(first - first % step, last, step)
    inner = [block for block in between if block - first > step / 2 and last - block > step / 2]
    return [first, *inner, last] if last > first else [first]


def add_legend(figure: Figure, axis: Axes, models: int, others: Sequence[Artist] = ()) -> None:
    """Add a legend below a figure: the lines of several models on an axis, and other entries."""
    handles = [*(axis.get_legend_handles_labels()[0] if models > 1 else ()), *others]
    if handles:
        box = figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
        disable_mathtext(box.get_texts())


def add_title_and_legend(
    figure: Figure,
    models: Sequence[ModelTables],
    axis: Axes,
    *,
    legend: bool = True,
    others: Sequence[Artist] = (),
) -> None:
    """Add a title with the model and its text, and a legend of several models and of other entries."""
    if legend:
        add_legend(figure, axis, len(models), others)
    captions = list(dict.fromkeys(model.caption for model in models))
    if len(models) == 1:
        text = f"{models[0].label}: {captions[0]}"
    else:
        text = captions[0] if len(captions) == 1 else "; ".join(f"{model.label}: {model.caption}" for model in models)
    add_title(figure, text)


def add_title(figure: Figure, text: str) -> None:
    """Add a title; it also says what the bands of `line` are, if there are any."""
    if any(item.get_label() == _BAND for axis in figure.axes for item in axis.collections):
        text = f"{text}; bands: one standard error"
    figure.suptitle(text, fontsize=10 if len(text) < 120 else 7, parse_math=False)
