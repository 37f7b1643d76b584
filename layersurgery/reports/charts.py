"""Prepare the data of the interactive charts: exact table values over depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..plans.route import Route
from .collect import FinishedRun, labels
from .text_format import plain, show_control_characters

_EDITS = {
    "swap": "swap",
    "drop": "drop",
    "skip-attention": "skip attention",
    "skip-mlp": "skip MLP",
    "drop-span": "drop a span",
}
_OF_EDITS = ("kl_nats", "agreement", "entropy_change_bits", "loss_change_nats", "accuracy")
# Label, unit, factor, whether the axis is logarithmic.
_KNOWN: dict[str, tuple[str, str, float, bool]] = {
    "kl_nats": ("KL from the unedited model", "nats", 1, True),
    "agreement": ("predictions kept", "%", 100, False),
    "entropy_bits": ("entropy", "bits", 1, False),
    "entropy_change_bits": ("change of entropy", "bits", 1, False),
    "loss_nats": ("loss", "nats", 1, False),
    "loss_change_nats": ("change of loss", "nats", 1, False),
    "accuracy": ("accuracy", "%", 100, False),
    "drop_kl_nats": ("KL when dropped", "nats", 1, True),
    "lens_kl_nats": ("logit lens: KL to the end", "nats", 1, False),
    "lens_entropy_bits": ("logit lens: entropy", "bits", 1, False),
    "lens_agreement": ("logit lens: model's own top token", "%", 100, False),
    "attention_prev5": ("share of attention on the previous five", "", 1, False),
    "attention_prev5_mean": ("mean attention to each of the previous five", "", 1, False),
    "attention_norm": ("norm of what attention adds", "", 1, False),
    "mlp_norm": ("norm of what the MLP adds", "", 1, False),
    "attention_to_mlp_ratio": ("norm of attention / MLP", "", 1, False),
    "prediction_percent": ("prediction neurons", "%", 1, False),
    "suppression_percent": ("suppression neurons", "%", 1, False),
    "self": ("cosine with itself, not swapped", "", 1, False),
    "index": ("cosine with what was at its place", "", 1, False),
    "adjacent": ("cosine of two neighbors", "", 1, False),
}
_UNITS = {"nats": "nats", "bits": "bits", "percent": "%", "seconds": "s", "bytes": "bytes"}
_NO_CURVES = ("layer", "relative_depth", "depth", "tokens", "sequences", "neurons", "row")
_MOST_GROUPS = 8
_OF_WHAT = (
    "Each point is one edited model, compared with the unedited one over every position that has a next token. KL: how "
    "far the predicted distribution moves. Predictions kept: how often the most likely next token stays what it was."
)


@dataclass(frozen=True, slots=True)
class Chart:
    """Chart with selectable views, each with selectable metrics.

    Attributes:
        key: its id within a page.
        title: its heading.
        about: how to read it.
        choice: label of the view selector.
        axis: label of the horizontal axis.
        views: the data of each view, in the form that the page's script reads.
    """

    key: str
    title: str
    about: str
    choice: str
    axis: str
    views: list[dict[str, Any]]

    @property
    def data(self) -> dict[str, Any]:
        """Return the chart in the form that the page's script reads."""
        metrics = dict.fromkeys(name for view in self.views for name in view["metrics"])
        return {
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
    if name in _KNOWN:
        label, unit, times, log = _KNOWN[name]
    else:
        words = name.split("_")
        unit = _UNITS.get(words[-1], "") if len(words) > 1 else ""
        label, times, log = show_control_characters(" ".join(words[:-1] if unit else words)), 1, False
    return {"label": label, "unit": unit, "times": times, "log": log}


def charts(runs: Sequence[FinishedRun]) -> list[Chart]:
    """Make a chart of edits and a chart of signals, if the runs have any."""
    edits = _of_edits([run for run in runs if run.is_sweep])
    signals = _of_signals([run for run in runs if not run.is_sweep])
    found = [
        Chart("edits", "What every edit does", _OF_WHAT, "Edit", "(first) block edited", edits),
        Chart("signals", "What each layer does", "", "Table", "layer", signals),
    ]
    return [chart for chart in found if chart.views]


def _of_edits(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    views = []
    for edit, words in _EDITS.items():
        lines = []
        for run, label in zip(runs, labels(runs), strict=True):
            rows = run.tables["results"]
            rows = rows[(rows.edit == edit) & rows.layer.notna()].sort_values("layer")
            if rows.empty:
                continue
            lengths = rows.depth - rows.route.map(lambda route: len(Route.parse(str(route))))
            for length, part in rows.groupby(lengths):
                several = edit == "drop-span" and lengths.nunique() > 1
                lines.append(_line(part, f"{label}, {length} blocks" if several else label, _OF_EDITS))
        if lines:
            views.append(_view(edit, words, lines))
    if len(runs) == 1 and len(views) > 1:
        lines = [line | {"label": view["label"]} for view in views if len(view["lines"]) == 1 for line in view["lines"]]
        if len(lines) > 1:
            views.insert(0, _view("all", "all edits", lines))
    return views


def _of_signals(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    views: dict[str, list[dict[str, Any]]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        for name, frame in run.tables.items():
            for group, part in _groups(frame):
                columns = [column for column in part.columns if _drawn(part, str(column))]
                if columns:
                    key = (
                        f"{show_control_characters(name)}: {show_control_characters(group)}"
                        if group
                        else show_control_characters(name)
                    )
                    views.setdefault(key, []).append(_line(part.sort_values("layer"), label, columns))
    return [_view(key, key.replace("_", " "), lines) for key, lines in views.items()]


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Split a table into groups in which each layer has one row; yield nothing if that is impossible."""
    if not all(name in frame and pd.api.types.is_numeric_dtype(frame[name]) for name in ("layer", "relative_depth")):
        return
    rows = frame[frame.layer.notna()]
    if rows.layer.is_unique:
        yield "", rows
        return
    keys = [
        column
        for column in rows.columns
        if not pd.api.types.is_numeric_dtype(rows[column]) and 1 < rows[column].nunique() <= _MOST_GROUPS
    ]
    if not keys or rows.duplicated([*keys, "layer"]).any():
        return
    for values, part in rows.groupby(keys, sort=False):
        yield ", ".join(map(str, values)), part


def _drawn(frame: pd.DataFrame, column: str) -> bool:
    if column in _NO_CURVES or column.endswith("_sem") or not pd.api.types.is_numeric_dtype(frame[column]):
        return False
    return not pd.api.types.is_bool_dtype(frame[column]) and bool(frame[column].notna().any())


def _line(frame: pd.DataFrame, label: str, columns: Sequence[str]) -> dict[str, Any]:
    columns = [str(column) for column in columns if column in frame]
    layers = frame.layer.tolist()
    return {
        "label": show_control_characters(label),
        "layer": _numbers(layers),
        "x": _numbers(frame.relative_depth.tolist()),
        "name": [show_control_characters(str(name)) for name in frame["name"]] if "name" in frame else None,
        "values": {column: _numbers(frame[column].tolist()) for column in columns},
        "errors": {column: _numbers(frame[f"{column}_sem"].tolist()) for column in columns if f"{column}_sem" in frame},
    }


def _numbers(values: Sequence[Any]) -> list[float | int | None]:
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
