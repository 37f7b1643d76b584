"""Print the metrics of tasks that a sweep measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

_PREFIX, _OF_CHANGES = "task_", ("_sem", "_change", "_change_sem", "_change_low", "_change_high")
_GAP = 2
_MOST_ROWS = 40


def task_metrics(frame: pd.DataFrame) -> list[str]:
    """Return the names of the columns of tasks' metrics, without those of their errors and changes."""
    return [str(name) for name in frame if str(name).startswith(_PREFIX) and not str(name).endswith(_OF_CHANGES)]


def task_table(frame: pd.DataFrame, width: int) -> Iterator[Table]:
    """Yield a table of the tasks' metrics, each with its standard error, the edits in the order of the first metric.

    Args:
        frame: the results.
        width: characters in a line; as many metrics are shown as there is room for.
    """
    metrics = task_metrics(frame)
    if not metrics:
        return
    first = metrics[0]
    direction = 1 if frame[first].max() > 1 else -1  # perplexities are better when they are low, shares when high
    edits = frame[frame.edit != "none"].sort_values(first, ascending=direction > 0, na_position="last")
    rows = [frame[frame.edit == "none"].iloc[0], *(row for _, row in edits.head(_MOST_ROWS).iterrows())]
    names = min(24, max(len(str(row["name"])) for row in rows))
    shown: list[str] = []
    used = names
    for metric in metrics:
        wide = max(len(_short(metric)), *(len(_cell(row, metric)) for row in rows)) + _GAP
        if not shown or used + wide <= width:
            shown.append(metric)
            used += wide
    left_out = [_short(metric) for metric in metrics if metric not in shown]
    notes = [f"not shown: {', '.join(left_out)}"] if left_out else []
    if len(edits) > _MOST_ROWS:
        notes.append(f"{_MOST_ROWS} of {len(edits)} edits; results.csv has all")
    table = Table(
        box=None, pad_edge=False, header_style="bold", caption="; ".join(notes) or None, caption_justify="left"
    )
    table.add_column("tasks", overflow="fold")
    for metric in shown:
        table.add_column(_short(metric), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(str(row["name"])), *(_cell(row, metric) for metric in shown))
    yield table


def _short(metric: str) -> str:
    return metric.removeprefix(_PREFIX)


def _cell(row: pd.Series, metric: str) -> str:
    value, error = float(row[metric]), float(row.get(f"{metric}_sem", math.nan))
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} ±{error:.2g}"
