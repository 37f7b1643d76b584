"""Draw sweeps. Bands are the confidence intervals of the table; in one of an earlier version, standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plans.families import FAMILIES, Bounds
from ..registry import PROPAGATION, Column, column
from .copies import COPIES, copies
from .layer_kinds import kind_handles, mark_kinds, rare_kinds
from .maps import edit_map
from .propagation import drawn_edits, propagation
from .style import (
    COLORS,
    MARKERS,
    ModelTables,
    add_legend,
    disable_mathtext,
    label_axis,
    label_depth,
    new_figure,
    save,
)
from .tails import TAILS, has_tails, tails
from .tasks import task_maps, tasks_over_depth

_BY_LAYER = tuple(family.name for family in FAMILIES.values() if family.per_layer)
_KL, _AGREEMENT = column("kl_nats"), column("agreement")
_PANELS = (_KL, _AGREEMENT, column("entropy_change_bits"))


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep to draw.

    Attributes:
        frame: its results.
        label: name of the model.
        caption: the text that it was measured on.
    """

    frame: pd.DataFrame
    label: str
    caption: str

    @classmethod
    def of(cls, frame: pd.DataFrame, data: str, noun: str = "sequence") -> Sweep:
        """Make a sweep to draw from results, the name of the data, and what one of its sequences is."""
        row = frame.iloc[0]
        sequences = f"{row.sequences:,} {noun}{'s' if row.sequences > 1 else ''}"
        up_to = "up to " if frame.sequences.nunique() > 1 else ""
        return cls(frame, str(row.model).rpartition("/")[2], f"{up_to}{row.tokens:,} tokens of {data} in {sequences}")


def draw(sweeps: Sequence[Sweep], directory: Path) -> list[Path]:
    """Draw all figures that the results allow, as PNG and SVG, and return the files."""
    return save(sweep_figures(sweeps), directory)


def sweep_figures(sweeps: Sequence[Sweep]) -> dict[str, Figure]:
    """Draw all figures that the results allow, and return them by name."""
    figures = {}
    edits = {edit for sweep in sweeps for edit in sweep.frame.edit}
    if edits & set(_BY_LAYER):
        figures["robustness"] = robustness(sweeps)
        figures |= tasks_over_depth(sweeps)
    if "copy" in edits:
        figures[COPIES] = copies(sweeps)
    for index, sweep in enumerate(sweeps):
        suffix = f"-{index + 1}" if len(sweeps) > 1 else ""
        figures |= {f"{name}{suffix}": figure for name, figure in maps(sweep).items()}
        figures |= {f"{name}{suffix}": figure for name, figure in task_maps(sweep).items()}
        changes = ModelTables(
            {PROPAGATION: pd.DataFrame(sweep.frame.attrs.get(PROPAGATION, []))}, sweep.label, sweep.caption
        )
        if drawn_edits(changes.tables[PROPAGATION]):
            figures[f"{PROPAGATION}{suffix}"] = propagation([changes])
        if has_tails(sweep.frame):
            figures[f"{TAILS}{suffix}"] = tails(sweep.frame, f"{sweep.label}: {sweep.caption}")
        if (sweep.frame.edit == "plan").any():
            figures[f"plans{suffix}"] = plans(sweep)
    return figures


def robustness(sweeps: Sequence[Sweep]) -> Figure:
    """Draw the effect of edits of single layers over depth: a row for each edit, a line for each model.

    The panels show KL, top-1 agreement and the change in entropy, as in figure 3 of the paper (swap above drop) and
    its figures 13 to 15.
    """
    kinds = [edit for edit in _BY_LAYER if any((sweep.frame.edit == edit).any() for sweep in sweeps)]
    rare = rare_kinds([sweep.frame[sweep.frame.edit.isin(kinds)] for sweep in sweeps])
    with new_figure(11, 0.9 + 2.4 * len(kinds)) as figure:
        grid = figure.subplots(len(kinds), len(_PANELS), sharex=True, sharey="col", squeeze=False)
        for axes, kind in zip(grid, kinds, strict=True):
            for index, sweep in enumerate(sweeps):
                rows = sweep.frame[sweep.frame.edit == kind].sort_values("layer")
                names = FAMILIES[kind].lines(rows.plan, rows.layer, int(rows.depth.iloc[0])) if len(rows) else []
                for number, (name, part) in enumerate(rows.groupby(np.array(names, dtype=str), sort=False)):
                    label = f"{sweep.label}, {name}" if name else sweep.label
                    for axis, metric in zip(axes, _PANELS, strict=True):
                        _line(axis, part, metric, index + number * len(sweeps), label, rare)
            if len(axes[0].get_lines()) > len(sweeps):
                disable_mathtext(axes[0].legend(fontsize=7).get_texts())
            axes[0].set_title(FAMILIES[kind].title, loc="left", fontweight="bold")
            for axis, metric in zip(axes, _PANELS, strict=True):
                label_axis(axis, metric)
                axis.set_yscale("log" if metric.log and _has_positive(sweeps, kind, metric) else "linear")
        for axis in grid[-1]:
            label_depth(axis, [sweep.frame[sweep.frame.layer.notna()] for sweep in sweeps], "block of the edit")
            axis.set_xlim(-0.02, 1.02)
        add_legend(figure, grid[0][0], len(sweeps), kind_handles(rare))
        _add_title(figure, sweeps, _bands(sweeps))
    return figure


def _has_positive(sweeps: Sequence[Sweep], kind: str, metric: Column) -> bool:
    """Tell whether there is a value that a logarithmic axis can show."""
    return any(
        (np.isfinite(values) & (values > 0)).any()
        for sweep in sweeps
        for values in [sweep.frame[sweep.frame.edit == kind][metric.name].to_numpy(float)]
    )


def _line(axis: Axes, rows: pd.DataFrame, metric: Column, index: int, label: str, rare: Sequence[str]) -> None:
    x = rows.relative_depth.to_numpy(float)
    y, low, high = _with_interval(rows, metric)
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    if metric.log:
        y = np.where(y > 0, y, np.nan)  # a logarithmic axis cannot show zero
        low = np.maximum(low, y / 100)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, y, color=color, marker=marker, label=label)
    mark_kinds(axis, rows, y, color, rare)


def _bands(sweeps: Sequence[Sweep]) -> str:
    """Say what the bands of curves are."""
    kinds = {
        f"{str(sweep.frame.interval.iloc[0]).partition(',')[0]} intervals"
        if "interval" in sweep.frame and "kl_nats_low" in sweep.frame
        else "one standard error"
        for sweep in sweeps
    }
    return f"bands: {' or '.join(sorted(kinds))}"


def _with_interval(rows: pd.DataFrame, metric: Column) -> list[np.ndarray]:
    """Return a metric's values and the ends of their intervals; without intervals, one standard error to each side."""
    value = rows[metric.name]
    if f"{metric.name}_low" in rows:
        parts = [value, rows[f"{metric.name}_low"], rows[f"{metric.name}_high"]]
    else:
        parts = [value, value - rows[f"{metric.name}_sem"], value + rows[f"{metric.name}_sem"]]
    return [metric.factor * part.to_numpy(float) for part in parts]


def maps(sweep: Sweep) -> dict[str, Figure]:
    """Draw the map of each family of edits that has one, and return the figures by the families' names.

    A family that was measured with several numbers (of passes) has a figure for each, numbered from the second.
    """
    figures = {}
    for family in FAMILIES.values():
        rows = sweep.frame[sweep.frame.edit == family.name]
        if not family.axes or rows.empty:
            continue
        depth = int(rows.depth.iloc[0])
        if "from" not in rows:  # a table of an earlier version
            cells = {str(member.edit): member.cell for member in family.members(Bounds(range(depth), depth))}
            places = [cells.get(plan, (None, None)) for plan in rows.plan]
            rows = rows.assign(**pd.DataFrame(places, rows.index, ["from", "to"], dtype="Int64"))
        lines = np.array(family.lines(rows.plan, rows.layer, depth), dtype=str)
        for number, (line, part) in enumerate(rows.groupby(lines, sort=False), 1):
            title = ", ".join(filter(None, [f"{sweep.label}: {family.title}", str(line), sweep.caption]))
            name = f"{family.name}-{number}" if number > 1 else family.name
            figures[name] = edit_map(part, family.axes, title, symmetric=family.symmetric, best=int(family.of_blocks))
    return figures


def plans(sweep: Sweep) -> Figure:
    """Draw KL and top-1 agreement of user plans as bars, the lowest KL on top."""
    rows = sweep.frame[sweep.frame.edit == "plan"].sort_values("kl_nats", ascending=False)
    with new_figure(9, 1.4 + 0.28 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        names = [name if len(name) < 44 else f"{name[:40]} ..." for name in rows.name]
        positions = np.arange(len(rows))
        for axis, metric, color in ((left, _KL, COLORS[0]), (right, _AGREEMENT, COLORS[1])):
            values, low, high = _with_interval(rows, metric)
            ends = np.maximum([values - low, high - values], 0)
            axis.barh(positions, values, xerr=ends, color=color, ecolor="#444444")
            axis.set_xlabel(metric.axis)
            axis.grid(visible=False, axis="y")
        left.set_yticks(positions, names)
        disable_mathtext(left.get_yticklabels())
        right.set_xlim(0, 100)
        _add_title(figure, [sweep])
    return figure


def _add_title(figure: Figure, sweeps: Sequence[Sweep], more: str = "") -> None:
    captions = list(dict.fromkeys(sweep.caption for sweep in sweeps))
    if len(sweeps) == 1:
        text = f"{sweeps[0].label}: {captions[0]}"
    else:
        text = captions[0] if len(captions) == 1 else "; ".join(f"{sweep.label} {sweep.caption}" for sweep in sweeps)
    text += f"; {more}" * bool(more)
    figure.suptitle(text, fontsize=10 if len(text) < 120 else 7, parse_math=False)
