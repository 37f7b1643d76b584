"""Draw the tails of a sweep over depth: quantiles of KL, and how probabilities change."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plans.families import FAMILIES
from ..registry import TAILS as COLUMNS
from ..registry import Column, column
from .style import COLORS, MARKERS, label_depth, new_figure

TAILS = "tails"
"""Name of the figure."""
_KL = (column("kl_nats"), *(one for one in COLUMNS if one.unit == "nats"))
_SHARES = (column("agreement"), *(one for one in COLUMNS if one.unit == "%"))


def has_tails(frame: pd.DataFrame) -> bool:
    """Return whether a table has tails of edits that have a place in the depth."""
    return all(one.name in frame for one in COLUMNS) and any(True for _ in _panels(frame))


def _panels(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a title and the rows of each family over depth, for each of its numbers."""
    for family in FAMILIES.values():
        rows = frame[frame.edit == family.name].sort_values("layer")
        if not family.per_layer or rows.empty:
            continue
        names = np.array(family.lines(rows.plan, rows.layer, int(rows.depth.iloc[0])), dtype=str)
        for name, part in rows.groupby(names, sort=False):
            yield ", ".join(filter(None, [family.title, str(name)])), part


def tails(frame: pd.DataFrame, title: str) -> Figure:
    """Draw quantiles of KL (left) and shares of predictions (right) over depth, a row for each family of edits.

    Args:
        frame: results of a sweep with tails.
        title: title of the figure.
    """
    panels = [*_panels(frame)]
    with new_figure(11, 0.9 + 2.6 * len(panels)) as figure:
        grid = figure.subplots(len(panels), 2, sharex=True, squeeze=False)
        for (left, right), (name, rows) in zip(grid, panels, strict=True):
            left.set_title(name, loc="left", fontweight="bold")
            _lines(left, rows, _KL, "KL, mean")
            if any((rows[one.name] > 0).any() for one in _KL):
                left.set_yscale("log")
            left.set_ylabel(fill(f"KL over positions ({_KL[0].unit})", 34))
            _lines(right, rows, _SHARES, _SHARES[0].label)
            right.set_ylabel("%")
            right.set_ylim(0, 102)
        for axis in grid[-1]:
            label_depth(axis, [frame[frame.layer.notna()]], "block of the edit")
            axis.set_xlim(-0.02, 1.02)
        handles = [line for axis in grid[0] for line in axis.get_lines()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _lines(axis: Axes, rows: pd.DataFrame, columns: tuple[Column, ...], first: str) -> None:
    """Draw columns over depth; `first` is what the legend says of the first one."""
    for index, one in enumerate(columns):
        values = one.factor * rows[one.name].to_numpy(float)
        values = np.where(values > 0, values, np.nan) if one.log else values  # a logarithmic axis cannot show zero
        axis.plot(
            rows.relative_depth.to_numpy(float), values, color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)], label=one.label if index else first,
        )  # fmt: skip
