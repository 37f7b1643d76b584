"""Show the results of a sweep while it runs: each value with half of its interval's width, and what is finished."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from layersurgery.registry import column

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.sweeps.precision import Precision

_METRICS = ("kl_nats", "agreement")


def live_table(frame: pd.DataFrame, rows: int, precision: Precision | None = None) -> Table:
    """Return a table of the edits, those that need the most text first, or in their own order without a precision.

    Args:
        frame: the results so far.
        rows: number of edits that have room; the others are counted below.
        precision: the precision at which an edit is finished; None if all text is measured.
    """
    edited = frame[frame.edit != "none"]
    left = None
    if precision is not None:
        left = precision.sequences_left(edited).where(~edited.precise.astype(bool), -1).fillna(math.inf)
        edited = edited.loc[left.sort_values(ascending=False, kind="stable").index]
    asked = [] if precision is None else [target.metric for target in precision.targets]
    shown = list(dict.fromkeys((*_METRICS, *asked)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("edit", no_wrap=True)
    for name in shown:
        table.add_column(column(name).heading or column(name).label, justify="right", no_wrap=True)
    table.add_column("sequences", justify="right")
    if precision is not None:
        table.add_column("more", justify="right")
    for index, row in edited.head(rows).iterrows():
        cells = [_with_half_width(row, name) for name in shown]
        more = [] if left is None else ["done" if left[index] < 0 else _about(left[index])]
        table.add_row(Text(str(row["name"])), *cells, str(row.sequences), *more)
    if len(edited) > rows:
        table.caption, table.caption_justify = f"and {len(edited) - rows} more", "left"
    return table


def _with_half_width(row: pd.Series, name: str) -> str:
    entry = column(name)
    half = entry.factor * (row[f"{name}_high"] - row[f"{name}_low"]) / 2
    value = f"{entry.factor * row[name]:.{entry.digits}f}"
    return value if math.isnan(half) else f"{value} ± {half:.{entry.digits}f}"


def _about(sequences: float) -> str:
    return "?" if math.isinf(sequences) else f"~{math.ceil(sequences):,}"
