"""Tables as a page shows them: headings and cells, an error beside its value, the exact number behind the rounded one."""

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
    """A column.

    Attributes:
        title: its heading.
        unit: of its numbers; empty where there is none.
        numeric: whether it holds numbers.
    """

    title: str
    unit: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell.

    Attributes:
        text: what is read.
        value: the number behind it in full, as text; empty where there is none.
        error: one standard error.
    """

    text: str
    value: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table to show.

    Attributes:
        name: of it.
        columns: their headings.
        rows: the cells.
        notes: what is not in it.
    """

    name: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str]


def of_frame(name: str, frame: pd.DataFrame) -> Table:
    """Any table, its columns of errors beside their values."""
    frame = frame.set_axis([str(column) for column in frame.columns], axis=1)
    errors = {column for column in frame if column.endswith("_sem") and column.removesuffix("_sem") in frame}
    kept = [
        column for column in frame if column not in errors and not (column == "model" and frame.model.nunique() < 2)
    ]
    columns = [Column(column.replace("_", " "), "", _numeric(frame[column])) for column in kept]
    rows = [
        [_cell(row[column], row.get(f"{column}_sem")) if about.numeric else Cell(rounded(row[column])) for column, about in zip(kept, columns, strict=True)]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    return Table(name, columns, rows, [])


def of_routes(runs: Sequence[FinishedRun], most: int) -> Table:
    """Every route of every sweep; of sweeps with more than their share, edits of single layers first and then the mildest.

    Args:
        runs: of sweeps.
        most: rows in all.
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
                f"{label}: {share} of {len(frame)} routes, edits of single layers and then the mildest; all are in {run.path / 'results.csv'}"
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
