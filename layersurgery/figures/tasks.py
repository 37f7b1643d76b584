"""Draw the metrics of tasks over depth: a row for each kind of edit, a column for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plans.families import FAMILIES
from ..registry import column, first_metrics
from .maps import draw_map
from .style import COLORS, MARKERS, ModelTables, add_title_and_legend, disable_mathtext, label_depth, new_figure

if TYPE_CHECKING:
    from .sweeps import Sweep

_BY_LAYER = tuple(family.name for family in FAMILIES.values() if family.per_layer)
_MOST_METRICS = 8


def tasks_over_depth(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """Draw the metrics of tasks over depth: a figure for the sweeps of the same tasks, numbered from the second."""
    groups: dict[tuple[str, ...], list[Sweep]] = {}
    for sweep in sweeps:
        if found := first_metrics(sweep.frame)[:_MOST_METRICS]:
            groups.setdefault(tuple(found), []).append(sweep)
    figures: dict[str, Figure] = {}
    for metrics, group in groups.items():
        kinds = [kind for kind in _BY_LAYER if any((sweep.frame.edit == kind).any() for sweep in group)]
        if kinds:
            figures[f"tasks-{len(figures) + 1}" if figures else "tasks"] = _over_depth(group, metrics, kinds)
    return figures


def task_maps(sweep: Sweep) -> dict[str, Figure]:
    """Draw a map of the changes of tasks' metrics for each family of edits that has one."""
    figures = {}
    for family in FAMILIES.values():
        rows = sweep.frame[sweep.frame.edit == family.name]
        changes = [f"{metric}_change" for metric in first_metrics(rows) if f"{metric}_change" in rows]
        if family.axes and "from" in rows and len(rows) and changes:
            shown = changes[:_MOST_METRICS]
            figures[f"tasks-{family.name}"] = _maps(sweep, rows, shown, family.axes, symmetric=family.symmetric)
    return figures


def _over_depth(sweeps: Sequence[Sweep], metrics: Sequence[str], kinds: Sequence[str]) -> Figure:
    with new_figure(max(6.0, 0.6 + 4 * len(metrics)), 1.2 + 2.5 * len(kinds)) as figure:
        grid = figure.subplots(len(kinds), len(metrics), sharex=True, sharey="col", squeeze=False)
        for axes, kind in zip(grid, kinds, strict=True):
            for axis, metric in zip(axes, metrics, strict=True):
                for index, sweep in enumerate(sweeps):
                    _unedited(axis, sweep, metric, index, alone=len(sweeps) == 1)
                    rows = sweep.frame[sweep.frame.edit == kind].sort_values("layer")
                    names = FAMILIES[kind].lines(rows.plan, rows.layer, int(rows.depth.iloc[0])) if len(rows) else []
                    for number, (name, part) in enumerate(rows.groupby(np.array(names, dtype=str), sort=False)):
                        label = f"{sweep.label}, {name}" if name else sweep.label
                        _line(axis, sweep, part, metric, index + number * len(sweeps), label)
                axis.set_ylabel(column(metric).label)
                disable_mathtext([axis.yaxis.label])
                if len(set(axis.get_legend_handles_labels()[1])) > len(sweeps) + 1:
                    disable_mathtext(axis.legend(fontsize=7).get_texts())
            axes[0].set_title(FAMILIES[kind].title, loc="left", fontweight="bold")
        for axis in grid[-1]:
            label_depth(axis, [sweep.frame[sweep.frame.layer.notna()] for sweep in sweeps], "block of the edit")
            axis.set_xlim(-0.02, 1.02)
        handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
        shown = {text: handle for text, handle in handles.items() if len(sweeps) > 1 or text.startswith("unedited")}
        box = figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(4, len(shown)))
        disable_mathtext(box.get_texts())
        add_title_and_legend(
            figure, [ModelTables({}, sweep.label, sweep.caption) for sweep in sweeps], grid[0][0], legend=False
        )
    return figure


def _unedited(axis: Axes, sweep: Sweep, metric: str, index: int, *, alone: bool) -> None:
    """Draw the unedited model as a line, with a band of one standard error to each side if there is one model."""
    row = sweep.frame[sweep.frame.edit == "none"].iloc[0]
    value, error = float(row[metric]), float(row.get(f"{metric}_sem", np.nan))
    color = "#666666" if alone else COLORS[index % len(COLORS)]
    label = "unedited (band: one standard error)" if alone else f"{sweep.label}, unedited"
    axis.axhline(value, color=color, linewidth=1, linestyle="--", label=label, zorder=1)
    if alone and np.isfinite(error):
        axis.axhspan(value - error, value + error, color=color, alpha=0.12, linewidth=0, zorder=0)


def _line(axis: Axes, sweep: Sweep, rows: pd.DataFrame, metric: str, index: int, label: str) -> None:
    """Draw a metric over depth; the band is the interval of its change, which compares the same documents."""
    x, y = rows.relative_depth.to_numpy(float), rows[metric].to_numpy(float)
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    if f"{metric}_change_low" in rows:
        base = float(sweep.frame[sweep.frame.edit == "none"].iloc[0][metric])
        low, high = (base + rows[f"{metric}_change_{end}"].to_numpy(float) for end in ("low", "high"))
    else:
        error = rows[f"{metric}_sem"].to_numpy(float)
        low, high = y - error, y + error
    if metric.endswith("_acc"):
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, y, color=color, marker=marker, label=label)
    values = y[np.isfinite(y)]
    if values.size and values.min() > 0 and values.max() > 100 * values.min():  # a perplexity
        axis.set_yscale("log")


def _maps(
    sweep: Sweep, rows: pd.DataFrame, changes: Sequence[str], axes: tuple[str, str], *, symmetric: bool
) -> Figure:
    """Draw the change of each task's metric as a map."""
    with new_figure(max(5.5, 4.8 * len(changes)), 5) as figure:
        panels = figure.subplots(1, len(changes), squeeze=False)[0]
        for axis, change in zip(panels, changes, strict=True):
            draw_map(figure, axis, rows, column(change), rows=axes[0], columns=axes[1], symmetric=symmetric)
        title = f"{sweep.label}: {FAMILIES[str(rows.edit.iloc[0])].title}, {sweep.caption}"
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
