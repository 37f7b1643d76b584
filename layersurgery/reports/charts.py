"""Prepare the data of the interactive charts: exact table values over depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..plans.families import FAMILIES
from ..registry import METRICS, TAILS, Column, column, first_metrics
from .collect import FinishedRun, labels
from .text_format import plain, show_control_characters

_NO_CURVES = (
    *("layer", "relative_depth", "depth", "tokens", "sequences", "neurons", "row", "kl_tokens"),
    *("position", "from", "to", "head", "draws"),
)
_NO_KEYS = ("precise", "race", "interval", "layer_kind")
_MOST_GROUPS = 8
_NOTE = (
    "Bands show one standard error over sequences (of a task's metric, over documents) on each side. Point at a curve "
    "for its values, or focus the chart and use the arrow keys."
)


@dataclass(frozen=True, slots=True)
class Chart:
    """Chart with selectable views, each with selectable metrics.

    Attributes:
        key: its id within a page.
        title: its heading.
        about: how to read it.
        note: what can be done with it.
        choice: label of the view selector.
        axis: label of the horizontal axis.
        views: the data of each view, in the form that the page's script reads.
    """

    key: str
    title: str
    about: str
    note: str
    choice: str
    axis: str
    views: list[dict[str, Any]]

    @property
    def data(self) -> dict[str, Any]:
        """Return the chart in the form that the page's script reads."""
        metrics = dict.fromkeys(name for view in self.views for name in view["metrics"])
        return {
            "kind": "curves",
            "choice": self.choice,
            "axis": self.axis,
            "deepest": self._deepest(),
            "metrics": {name: metric(name) for name in metrics},
            "views": self.views,
        }

    def _deepest(self) -> int | None:
        """Return the number of the last layer if all models have the same, else None."""
        lines = [line for view in self.views for line in view["lines"]]
        found = {
            round(layer / x) for line in lines for layer, x in zip(line["layer"], line["x"], strict=True) if layer and x
        }
        return found.pop() if len(found) == 1 else None


def metric(name: str) -> dict[str, Any]:
    """Return a column's label, unit, display factor, and whether its axis is logarithmic."""
    about = column(name)
    label = show_control_characters(about.label)
    return {"label": label, "unit": about.unit, "times": about.factor, "log": about.log}


def charts(runs: Sequence[FinishedRun]) -> list[Chart]:
    """Make a chart of edits and a chart of signals, if the runs have any."""
    edits = _of_edits([run for run in runs if run.is_sweep])
    signals = _of_signals([run for run in runs if not run.is_sweep])
    found = [
        Chart("edits", "What every edit does", _about_edits(runs), _NOTE, "Edit", "block of the edit", edits),
        Chart("signals", "What each layer does", "", _NOTE, "Table", "layer", signals),
    ]
    return [chart for chart in found if chart.views]


def _about_edits(runs: Sequence[FinishedRun]) -> str:
    tails = [tail for tail in TAILS if any(tail.name in run.tables["results"] for run in runs if run.is_sweep)]
    shown = [*_shown(), *tails]
    definitions = [f"{one.label[0].upper()}{one.label[1:]}: {one.definition}." for one in shown if one.definition]
    first = "Each point is one edited model, compared with the unedited one over every position that has a next token."
    return " ".join([first, *definitions])


def _shown() -> list[Column]:
    return [metric for metric in METRICS if metric.shown]


def _of_edits(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    views = []
    for family in FAMILIES.values():
        if not family.per_layer:
            continue
        lines = []
        for run, label in zip(runs, labels(runs), strict=True):
            rows = run.tables["results"]
            rows = rows[(rows.edit == family.name) & rows.layer.notna()].sort_values("layer")
            if rows.empty:
                continue
            names = [*(metric.name for metric in (*_shown(), *TAILS)), *first_metrics(rows)]
            for name, part in rows.groupby(
                np.array(family.lines(rows.plan, rows.layer, int(rows.depth.iloc[0]))), sort=False
            ):
                lines.append(_line(part, f"{label}, {name}" if name else label, names))
        if lines:
            views.append(_view(family.name, family.label, lines))
    if len(runs) == 1 and len(views) > 1:
        lines = [line | {"label": view["label"]} for view in views if len(view["lines"]) == 1 for line in view["lines"]]
        if len(lines) > 1:
            views.insert(0, _view("all", "all edits", lines))
    return views


def _of_signals(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    views: dict[str, list[dict[str, Any]]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        for name, frame in run.tables.items():
            if not _has_depth(frame):
                continue
            for group, part in groups(frame, ["layer"]):
                columns = drawn_columns(part)
                if columns:
                    key = (
                        f"{show_control_characters(name)}: {show_control_characters(group)}"
                        if group
                        else show_control_characters(name)
                    )
                    views.setdefault(key, []).append(_line(part.sort_values("layer"), label, columns))
    return [_view(key, key.replace("_", " "), lines) for key, lines in views.items()]


def _has_depth(frame: pd.DataFrame) -> bool:
    return all(name in frame and pd.api.types.is_numeric_dtype(frame[name]) for name in ("layer", "relative_depth"))


def groups(frame: pd.DataFrame, places: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Split a table into groups in which each place has one row; leave out groups in which a place has several.

    Args:
        frame: the table.
        places: the columns of numbers that are a row's place: the layer of a curve, both sides of a map.

    Returns:
        The values of the columns of text that tell the groups apart, joined, and the rows of each group.
    """
    rows = frame[frame[[*places]].notna().all(axis=1)]
    if not rows.duplicated([*places]).any():
        yield "", rows
        return
    keys = [
        column
        for column in rows.columns
        if column not in _NO_KEYS
        and not pd.api.types.is_numeric_dtype(rows[column])
        and 1 < rows[column].nunique() <= _MOST_GROUPS
    ]
    for values, part in rows.groupby(keys, sort=False) if keys else ():
        if not part.duplicated([*places]).any():
            yield ", ".join(map(str, values)), part


def drawn_columns(frame: pd.DataFrame) -> list[str]:
    """Return the names of the columns of numbers that are values, and neither places nor errors."""
    return [str(name) for name in frame.columns if _drawn(frame, str(name))]


def _drawn(frame: pd.DataFrame, column: str) -> bool:
    if (
        column in _NO_CURVES
        or column.endswith(("_sem", "_low", "_high"))
        or not pd.api.types.is_numeric_dtype(frame[column])
    ):
        return False
    return not pd.api.types.is_bool_dtype(frame[column]) and bool(frame[column].notna().any())


def _line(frame: pd.DataFrame, label: str, columns: Sequence[str]) -> dict[str, Any]:
    columns = [str(column) for column in columns if column in frame]
    layers = frame.layer.tolist()
    return {
        "label": show_control_characters(label),
        "layer": numbers(layers),
        "x": numbers(frame.relative_depth.tolist()),
        "name": _point_names(frame),
        "values": {column: numbers(frame[column].tolist()) for column in columns},
        "errors": {column: numbers(frame[f"{column}_sem"].tolist()) for column in columns if f"{column}_sem" in frame},
    }


def _point_names(frame: pd.DataFrame) -> list[str] | None:
    """Return what each point is called, with the kind of its layer; None if its layer's number is enough."""
    kinds = frame.layer_kind if "layer_kind" in frame else [None] * len(frame)
    if "name" not in frame and "layer_kind" not in frame:
        return None
    names = frame["name"] if "name" in frame else [f"layer {layer}" for layer in frame.layer]
    return [
        show_control_characters(str(name) if pd.isna(kind) else f"{name} ({kind})")
        for name, kind in zip(names, kinds, strict=True)
    ]


def numbers(values: Sequence[Any]) -> list[float | int | None]:
    """Convert values for JSON; NaN, infinity and other non-numbers become None."""
    found = [plain(value) for value in values]
    return [
        value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None
        for value in found
    ]


def _view(key: str, label: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for line in lines for name in line["values"]))
    return {
        "key": key,
        "label": label,
        "metrics": names,
        "lines": [line | {"place": index} for index, line in enumerate(lines)],
    }
