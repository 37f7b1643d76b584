"""Prepare the data of the interactive maps: exact table values for each pair of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..figures.map_scale import DIVERGING, SEQUENTIAL, MapScale, is_band, lowest_cells
from ..plans.families import FAMILIES
from ..registry import AXES, METRICS, Axes, Column, column, first_metrics
from ..sweeps.results import CELL
from .charts import drawn_columns, groups, metric, numbers
from .collect import FinishedRun, is_map, labels
from .text_format import plain, show_control_characters

_OF_EDITS = tuple(metric.name for metric in METRICS if metric.name in ("kl_nats", "agreement", "loss_change_nats"))
_MOST_CELLS = 12_000  # of one page, about 130 bytes each
_DIGITS = 4  # of the ends of intervals; values are exact


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps with selectable views, each with selectable metrics.

    Attributes:
        key: its id within a page.
        title: its heading.
        about: how to read it.
        note: what can be done with it.
        choice: label of the view selector.
        views: the data of each view, in the form that the page's script reads.
    """

    key: str
    title: str
    about: str
    note: str
    choice: str
    views: list[dict[str, Any]]

    @property
    def data(self) -> dict[str, Any]:
        """Return the maps in the form that the page's script reads."""
        metrics = dict.fromkeys(name for view in self.views for name in view["metrics"])
        return {
            "kind": "maps",
            "choice": self.choice,
            "colors": [SEQUENTIAL, DIVERGING],
            "metrics": {name: metric(name) for name in metrics},
            "views": self.views,
        }


_ABOUT_EDITS = (
    "Each cell is one edited model, compared with the unedited one. Hatched cells were not measured. A ring marks the "
    "lowest KL on each side of the diagonal."
)
_NOTE = "Point at a cell for its values, or focus the map and use the arrow keys."
_COPY = "A click, a tap or Enter copies the cell's plan."


def maps(runs: Sequence[FinishedRun], left_out: list[str]) -> list[Maps]:
    """Make the maps of edits and the maps of analyses, if the runs have any.

    Args:
        runs: the runs.
        left_out: gets descriptions of the maps for which the page has no room, and of rows that no map can show.
    """
    room = _MOST_CELLS
    found = []
    for key, title, about, note, choice, views in (
        ("edit-maps", "What edits of spans and pairs do", _ABOUT_EDITS, f"{_NOTE} {_COPY}", "Edit", [*_of_edits(runs)]),
        ("layer-maps", "How layers relate", "", _NOTE, "Table", [*_of_analyses(runs, left_out)]),
    ):
        shown = []
        names = Counter(view["label"] for _, view in views)
        for label, view in views:
            cells, name = len(view["from"]), view["label"]
            if cells > room:
                left_out.append(f"{label}: the map {name}; the figure and the files have its {cells} cells")
                continue
            room -= cells
            shown.append(view | {"label": show_control_characters(f"{name}: {label}" if names[name] > 1 else name)})
        if shown:
            found.append(Maps(key, title, about, note, choice, shown))
    return found


def _of_edits(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the labels of runs and the views of their families of edits that have a map."""
    for family in FAMILIES.values():
        for run, label in zip(runs, labels(runs), strict=True):
            if not (family.axes and run.is_sweep and is_map(frame := run.tables["results"])):
                continue
            rows = frame[(frame.edit == family.name) & frame[[*CELL]].notna().all(axis=1)]
            lines = family.lines(map(str, rows.plan), rows.layer, int(frame.depth.iloc[0])) if len(rows) else []
            for line, part in rows.groupby(np.array(lines, dtype=str), sort=False):
                name = f"{family.label}, {line}" if line else family.label
                shown = [*_OF_EDITS, *(f"{metric}_change" for metric in first_metrics(part))]
                view = _view(name, part, [*map(column, shown)], *family.axes, symmetric=family.symmetric)
                cells = part.reset_index(drop=True)
                best = lowest_cells(cells, "kl_nats", int(family.of_blocks), symmetric=family.symmetric).index
                plans = [show_control_characters(str(plan)) for plan in part.plan]
                yield label, view | {"plans": plans, "best": [*map(int, best)]}


def _of_analyses(runs: Sequence[FinishedRun], left_out: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the labels of runs and the views of their tables that are maps, and name the rows that no map can show."""
    for run, label in zip(runs, labels(runs), strict=True):
        for table, frame in run.tables.items():
            if table == "results" or not is_map(frame):
                continue
            axes, shown = AXES.get(table, Axes()), 0
            for group, part in groups(frame, CELL):
                shown += len(part)
                about = [column(name, table) for name in drawn_columns(part)]
                if about:
                    name = (f"{table}: {group}" if group else table).replace("_", " ")
                    yield label, _view(name, part, about, axes.rows, axes.columns, symmetric=axes.symmetric)
            if missing := len(frame.dropna(subset=[*CELL])) - shown:
                left_out.append(f"{label}: {missing} rows of {table} on a map, since several of them have one place")


def _view(
    label: str, frame: pd.DataFrame, about: Sequence[Column], rows: str, columns: str, *, symmetric: bool = False
) -> dict[str, Any]:
    """Return a map in the form that the page's script reads."""
    known = [one for one in about if one.name in frame]
    return {
        "label": label,
        "metrics": [one.name for one in known],
        "rows": rows,
        "columns": columns,
        "band": is_band(frame),
        "symmetric": symmetric,
        "from": frame["from"].astype(int).tolist(),
        "to": frame["to"].astype(int).tolist(),
        "values": {one.name: numbers(frame[one.name].tolist()) for one in known},
        "errors": {one.name: _short(frame[f"{one.name}_sem"]) for one in known if f"{one.name}_sem" in frame},
        "intervals": {
            one.name: [_short(frame[f"{one.name}_low"]), _short(frame[f"{one.name}_high"])]
            for one in known
            if f"{one.name}_low" in frame and f"{one.name}_high" in frame
        },
        "scales": {one.name: _scale(frame[one.name], one) for one in known},
        "plans": None,
        "best": [],
    }


def _scale(values: pd.Series, about: Column) -> dict[str, Any]:
    scale = MapScale.of(about.factor * values.to_numpy(float, na_value=np.nan), about)
    ends = {"low": scale.low, "high": scale.high, "bend": scale.bend}
    return {"kind": scale.kind, "colors": int(scale.diverging), "ticks": scale.ticks} | ends


def _short(values: pd.Series) -> list[float | int | None]:
    return numbers([float(f"{plain(value):.{_DIGITS}g}") if plain(value) is not None else None for value in values])
