"""Format tables for a page: headings and cells, with errors and exact values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .charts import metric
from .collect import FinishedRun, labels
from .text_format import format_with_error, is_number, plain, rounded

_OF_ROUTES = (
    "kl_nats", "agreement", "entropy_change_bits", "entropy_bits", "loss_change_nats", "loss_nats", "accuracy",
)  # fmt: skip
_MANY = ("swap-pairs", "plan", "drop-span")


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table.

    Attributes:
        title: its heading.
        unit: unit of its numbers; empty if there is none.
        numeric: whether it holds numbers.
    """

    title: str
    unit: str = ""
    numeric: bool = True


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


def format_table(name: str, frame: pd.DataFrame) -> Table:
    """Format any table; columns of standard errors are merged with their values."""
    frame = frame.set_axis([str(column) for column in frame.columns], axis=1)
    errors = {column for column in frame if column.endswith("_sem") and column.removesuffix("_sem") in frame}
    kept = [
        column for column in frame if column not in errors and not (column == "model" and frame.model.nunique() < 2)
    ]
    columns = [Column(column.replace("_", " "), "", _numeric(frame[column])) for column in kept]
    rows = [
        [
            _cell(row[column], row.get(f"{column}_sem")) if about.numeric else Cell(rounded(row[column]))
            for column, about in zip(kept, columns, strict=True)
        ]
        for row in frame.to_dict("records")
    ]
    return Table(name, columns, rows, [])


def route_table(runs: Sequence[FinishedRun], most: int) -> Table:
    """Make a table of every route of every sweep.

    If a sweep has more routes than its share of rows, edits of single layers come first, then those with the lowest KL.

    Args:
        runs: finished sweeps.
        most: maximum number of rows in total.
    """
    frames = [run.tables["results"] for run in runs]
    metrics = [column for column in _OF_ROUTES if all(column in frame for frame in frames)]
    texts = {"model": "Model", "edit": "Edit", "name": "Name", "plan": "Plan"}
    if len(runs) == 1:
        del texts["model"]
    if all((frame["name"] == frame.plan)[frame.edit != "none"].all() for frame in frames):
        del texts["plan"]
    columns = [Column(title, numeric=False) for title in texts.values()]
    columns += [Column("Layer"), *(_column(column) for column in metrics), Column("Blocks in order", numeric=False)]
    rows, notes = [], []
    for run, label in zip(runs, labels(runs), strict=True):
        frame, share = run.tables["results"], max(1, most // len(runs))
        if len(frame) > share:
            notes.append(
                f"{label}: {share} of {len(frame)} routes, edits of single layers and then those with the lowest KL; "
                f"all are in {run.path / 'results.csv'}"
            )
            many = frame.edit.isin(_MANY)
            chosen = pd.concat([frame[~many], frame[many].sort_values("kl_nats", kind="stable")]).index[:share]
            frame = frame.loc[sorted(chosen)]
        for row in frame.to_dict("records"):
            cells = [Cell(label if column == "model" else rounded(row[column])) for column in texts]
            cells += [_cell(row["layer"], None)]
            cells += [_cell(row[column], row.get(f"{column}_sem"), metric(column)["times"]) for column in metrics]
            rows.append([*cells, Cell(rounded(row["route"]))])
    return Table("routes", columns, rows, notes)


def _column(name: str) -> Column:
    about = metric(name)
    return Column(f"{about['label'][0].upper()}{about['label'][1:]}", about["unit"])


def _numeric(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column)) and not pd.api.types.is_bool_dtype(column)


def _cell(value: Any, error: Any, times: float = 1) -> Cell:
    value, error = plain(value), plain(error)
    if not is_number(value):
        return Cell(rounded(value), "nan")
    scaled = (value, error) if times == 1 else (times * value, times * error if is_number(error) else None)
    text, spread = format_with_error(*scaled)
    return Cell(text, repr(value), spread)
