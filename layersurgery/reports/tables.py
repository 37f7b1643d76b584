"""Format tables for a page: headings and cells, with errors and exact values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..plans.families import FAMILIES
from ..registry import METRICS, TAILS, column, first_metrics
from .collect import FinishedRun, labels
from .text_format import format_with_error, is_number, plain, rounded

_FEW = ("none", *(family.name for family in FAMILIES.values() if family.width))
_LONG = 40
_YES_NO = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table.

    Attributes:
        title: its heading.
        unit: unit of its numbers; empty if there is none.
        numeric: whether it holds numbers.
        name: its name in the file; empty if the title is the name.
    """

    title: str
    unit: str = ""
    numeric: bool = True
    name: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: the displayed text.
        value: the exact number as text; empty if the cell has no number.
        error: one standard error.
    """

    text: str
    value: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Table to show.

    Attributes:
        name: name of the table.
        columns: its columns.
        rows: its cells.
        notes: descriptions of what is left out.
    """

    name: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str]

    @property
    def long_columns(self) -> list[bool]:
        """Return for each column whether a text in it is long, so that it is broken into lines."""
        return [any(len(row[place].text) > _LONG for row in self.rows) for place in range(len(self.columns))]


def format_table(title: str, frame: pd.DataFrame, name: str = "") -> Table:
    """Format any table; columns of standard errors are merged with their values.

    Args:
        title: its title.
        frame: the table.
        name: name of the analysis's table.
    """
    frame = frame.set_axis([str(key) for key in frame.columns], axis=1)
    errors = {key for key in frame if key.endswith("_sem") and key.removesuffix("_sem") in frame}
    # A metric's interval is as wide as a few of its errors; the files have it.
    errors |= {f"{metric.name}{end}" for metric in METRICS for end in ("_low", "_high")} | {"interval"}
    kept = [key for key in frame if key not in errors and not (key == "model" and frame.model.nunique() < 2)]
    entries = [column(key, name) for key in kept]
    numeric = [_numeric(frame[key]) for key in kept]
    columns = [
        Column(entry.label, entry.unit, is_numeric, entry.name if entry.name != entry.label else "")
        for entry, is_numeric in zip(entries, numeric, strict=True)
    ]
    rows = [
        [
            _cell(row[entry.name], row.get(f"{entry.name}_sem"), entry.factor)
            if is_numeric
            else Cell(rounded(row[entry.name]))
            for entry, is_numeric in zip(entries, numeric, strict=True)
        ]
        for row in frame.to_dict("records")
    ]
    return Table(title, columns, rows, [])


def tails_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the tails of a sweep's results, with the mean KL; an empty table without tails."""
    if not all(tail.name in frame for tail in TAILS):
        return pd.DataFrame()
    values = [METRICS[0].name, *(tail.name for tail in TAILS)]
    names = ["edit", "name", "layer", *(name for value in values for name in (value, f"{value}_sem"))]
    return frame[[name for name in names if name in frame]]


def route_table(runs: Sequence[FinishedRun], most: int) -> Table:
    """Make a table of every route of every sweep.

    If a sweep has more routes than its share of rows, edits of single layers come first, then those with the lowest KL.

    Args:
        runs: finished sweeps.
        most: maximum number of rows in total.
    """
    frames = [run.tables["results"] for run in runs]
    metrics = [metric for metric in METRICS if all(metric.name in frame for frame in frames)]
    metrics += [column(name) for name in dict.fromkeys(name for frame in frames for name in first_metrics(frame))]
    texts = {"model": "Model", "edit": "Edit", "name": "Name", "plan": "Plan"}
    if len(runs) == 1:
        del texts["model"]
    if all((frame["name"] == frame.plan)[frame.edit != "none"].all() for frame in frames):
        del texts["plan"]
    columns = [Column(title, numeric=False) for title in texts.values()]
    columns += [Column("Layer")]
    columns += [Column(f"{metric.label[0].upper()}{metric.label[1:]}", metric.unit) for metric in metrics]
    stopped = any("precise" in frame for frame in frames)
    if stopped:
        columns += [Column("Tokens"), Column("As precise as asked", numeric=False)]
    columns += [Column("Blocks in order", numeric=False)]
    rows, notes = [], []
    for run, label in zip(runs, labels(runs), strict=True):
        frame, share = run.tables["results"], max(1, most // len(runs))
        if len(frame) > share:
            notes.append(
                f"{label}: {share} of {len(frame)} routes, edits of single layers and then those with the lowest KL; "
                f"all are in results.csv in {run.path.name}"
            )
            few = frame.edit.isin(_FEW)
            chosen = pd.concat([frame[few], frame[~few].sort_values("kl_nats", kind="stable")]).index[:share]
            frame = frame.loc[sorted(chosen)]
        for row in frame.to_dict("records"):
            cells = [Cell(label if name == "model" else rounded(row[name])) for name in texts]
            cells += [_cell(row["layer"], None)]
            cells += [_cell(row.get(one.name), row.get(f"{one.name}_sem"), one.factor) for one in metrics]
            if stopped:
                cells += [_cell(row["tokens"], None), Cell(_YES_NO.get(row.get("precise"), ""))]
            rows.append([*cells, Cell(rounded(row["route"]))])
    return Table("routes", columns, rows, notes)


def _numeric(values: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(values)) and not pd.api.types.is_bool_dtype(values)


def _cell(value: Any, error: Any, times: float = 1) -> Cell:
    value, error = plain(value), plain(error)
    if not is_number(value):
        return Cell(rounded(value), "nan")
    scaled = (value, error) if times == 1 else (times * value, times * error if is_number(error) else None)
    text, spread = format_with_error(*scaled)
    return Cell(text, repr(value), spread)
