"""Mark the layers that are not of a model's most common kind: a shape around the marker of their value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

KIND = "layer_kind"
"""Column with the kind of a row's layer, or those of its adjacent blocks joined by " + "; see `with_layer_kinds`."""
_SHAPES = ("o", "s", "D", "^", "v", "p")


def rare_kinds(tables: Sequence[pd.DataFrame]) -> list[str]:
    """Return the kinds of layers that are marked: all but the most common one of each model, common ones first."""
    counts: Counter[str] = Counter()
    for table in tables:
        counts.update(_rare(table))
    return [kind for kind, _ in counts.most_common()]


def _rare(table: pd.DataFrame) -> dict[str, int]:
    """Count the rows of each kind but the most common one."""
    kinds = (kind for row in table[KIND].dropna() for kind in row.split(" + ")) if KIND in table else ()
    return dict(Counter(kinds).most_common()[1:])


def mark_kinds(axis: Axes, table: pd.DataFrame, y: Any, color: str, kinds: Sequence[str]) -> None:
    """Draw a shape around each value whose layer, or one of whose adjacent blocks, is of one of these kinds.

    Args:
        axis: the axis on which the values are drawn.
        table: the table of the values, with the column relative_depth.
        y: the values as they are drawn.
        color: color of their line.
        kinds: the kinds of all tables in the figure, as `rare_kinds` returns them; of two in one row, the last one is
            marked.
    """
    numbers = {kind: kinds.index(kind) for kind in _rare(table)}
    marked = [max(numbers.get(kind, -1) for kind in str(row).split(" + ")) for row in table.get(KIND, [])]
    for number in sorted(set(marked) - {-1}):
        chosen = np.array(marked) == number
        axis.plot(
            table.relative_depth.to_numpy(float)[chosen], np.asarray(y, float)[chosen], linestyle="none", color=color,
            **_shape(number),
        )  # fmt: skip


def kind_handles(kinds: Sequence[str]) -> list[Artist]:
    """Return the entries of a legend for these kinds."""
    return [
        Line2D([], [], linestyle="none", color="#555555", label=kind, **_shape(number))
        for number, kind in enumerate(kinds)
    ]


def _shape(number: int) -> Any:
    return {
        "marker": _SHAPES[number % len(_SHAPES)], "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.1,
    }  # fmt: skip
