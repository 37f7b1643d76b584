"""Print the results of an analysis: a table, sparklines over depth, and a summary in words."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from layersurgery.registry import ANALYSES
from layersurgery.units import format_list

from .charts import BAR_WIDTH, bar_cell, number_cell, sparkline
from .console import Console
from .run_cost import run_cost

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

_MAX_BAR_COLUMNS = 3
_MAX_HEADS = 10
_WRAP_WIDTH = 110
_LAYERS = {-1: "embeddings"}  # in the table of wic


def progress_line(frame: pd.DataFrame) -> str:
    """Summarize a table of results so far in one line."""
    rows = frame[frame.part == frame.part.iloc[-1]] if "part" in frame else frame
    if "head" in rows and "kl_nats" in rows:
        rows = rows.groupby("layer", as_index=False).kl_nats.max()
    rows = rows[rows["to"] == rows["from"] + 1] if "to" in rows else rows
    for analysis in ANALYSES.values():
        if analysis.columns and (column := analysis.columns[0]).name in rows:
            return f"{column.heading} {sparkline([_float(value) for value in rows[column.name]])}"
    return ""


def lines(name: str, frame: pd.DataFrame, width: int = 80) -> Iterator[str | Table | Text]:
    """Yield one table and its sparklines over depth; the table has bars if there is room."""
    yield ""
    if name == "similarity":
        yield from _similarity_tables(frame)
        return
    if name == "heads":
        yield from _dearest_heads(frame)
        return
    if name == "ablate-neurons":
        yield from _ablation_table(frame)
        return
    if "to" in frame:
        yield from _state_tables(name, frame)
        return
    if name == "subjoiners":
        yield from _head_table(frame)
        return
    if name == "probe":
        yield from _probe_table(frame)
        return
    columns = [column for column in ANALYSES[name].columns if column.name in frame] if name in ANALYSES else []
    if not columns or "layer" not in frame:
        return
    values = {column: [_float(value) for value in frame[column.name]] for column in columns}
    cells = {
        column: ["-" if math.isnan(value) else number_cell(value, column) for value in values[column]]
        for column in columns
    }
    curves = [column for column in columns if column.curve]
    used = (
        len("layer")
        + 11 * ("part" in frame)
        + sum(2 + max(len(column.heading), *map(len, cells[column])) for column in columns)
    )
    with_bar = curves[: max(0, width - used) // (2 + BAR_WIDTH)] if len(curves) <= _MAX_BAR_COLUMNS else []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True)
    parts = list(dict.fromkeys(frame.part)) if "part" in frame else []
    if parts:
        table.add_column("part", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
        if column in with_bar:
            table.add_column("", width=BAR_WIDTH, no_wrap=True)
    for number, layer in enumerate(frame.layer):
        row = [str(_LAYERS.get(layer, layer)), *([frame.part.iloc[number]] if parts else [])]
        for column in columns:
            row.append(cells[column][number])
            if column in with_bar:
                row.append(bar_cell(values[column][number], frame[column.name].astype(float).max()))
        table.add_row(*row)
    yield table
    yield ""
    rows_of = {f" {part}": [row for row, name in enumerate(frame.part) if name == part] for part in parts}
    for column in curves:
        for part, rows in (rows_of or {"": list(range(len(frame)))}).items():
            curve = sparkline([values[column][row] for row in rows], log=column.log)
            yield Text(f"{column.heading + part:>16} {curve}", no_wrap=True)


def _similarity_tables(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayers", justify="right", no_wrap=True)
    branches, columns = ("attention", "mlp", "block"), ANALYSES["similarity"].columns
    for branch in branches:
        for column in columns:
            title = branch if column is columns[0] else ""
            table.add_column(f"{title}\n{column.heading}", justify="right", no_wrap=True)
    rows_of = frame.set_index(["layer", "part"])
    for layer in dict.fromkeys(frame.layer):
        cells = [
            "-"
            if math.isnan(value := _float(rows_of.loc[(layer, branch), column.name]))
            else number_cell(value, column)
            for branch in branches
            for column in columns
        ]
        table.add_row(f"{layer} {layer + 1}", *cells)
    yield table
    yield ""
    first = columns[0]
    for branch in branches:
        curve = sparkline(frame[frame.part == branch][first.name].tolist())
        yield Text(f"{branch:>10}, {first.heading} {curve}", no_wrap=True)


def _state_tables(name: str, frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """Yield a table of how similar the stream before each layer is to that after it, to the first and to the last."""
    columns = [column for column in ANALYSES[name].columns if column.name in frame]
    cells = frame.set_index(["from", "to"])
    last = int(frame["to"].max())
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayer", justify="right", no_wrap=True)
    for column in columns:
        for heading in (f"{column.heading}\nafter it", "\nbefore all", "\nafter all"):
            table.add_column(heading, justify="right", no_wrap=True)
    for layer in range(last):
        values = [
            (column, float(cells[column.name][pair]))
            for column in columns
            for pair in ((layer, layer + 1), (0, layer), (layer, last))
        ]
        table.add_row(
            str(layer), *("-" if math.isnan(value) else number_cell(value, column) for column, value in values)
        )
    yield table
    yield ""
    for column in columns:
        curve = sparkline([float(cells[column.name][layer, layer + 1]) for layer in range(last)])
        yield Text(f"{column.heading:>20} {curve}", no_wrap=True)


def _dearest_heads(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """Yield a table of the heads that cost most when they are off, and the highest cost in each block."""
    columns = ANALYSES["heads"].columns
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("block", "head", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.nlargest(_MAX_HEADS, columns[0].name).to_dict("records"):
        cells = ((column, _float(row[column.name])) for column in columns)
        table.add_row(
            str(row["layer"]), str(row["head"]),
            *("-" if math.isnan(value) else number_cell(value, column) for column, value in cells),
        )  # fmt: skip
    yield table
    yield ""
    highest = frame.groupby("layer")[columns[0].name].max()
    yield Text(f"highest {columns[0].heading} of each block {sparkline(highest.tolist(), log=True)}", no_wrap=True)


def _ablation_table(frame: pd.DataFrame) -> Iterator[Table]:
    """Yield a table of the kinds of neurons in all blocks, and in the blocks where they make the largest difference."""
    columns = [column for column in ANALYSES["ablate-neurons"].columns if column.shown]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("neurons off", no_wrap=True)
    for heading in ("block", "number", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    whole, single = frame[frame.layer.isna()], frame[frame.layer.notna()]
    largest = single.reindex(single.entropy_change_bits_difference.abs().sort_values(ascending=False).index)
    for rows in (whole, largest.head(_MAX_HEADS)):
        for row, layer in zip(rows.to_dict("records"), rows.layer, strict=True):
            cells = ((column, _float(row[column.name])) for column in columns)
            table.add_row(
                row["kind"], "all" if rows is whole else str(layer), f"{row['neurons']:,}",
                *("-" if math.isnan(value) else number_cell(value, column) for column, value in cells),
            )  # fmt: skip
    yield table


def _head_table(frame: pd.DataFrame) -> Iterator[Table]:
    """Yield a table of the heads with the highest scores."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "layer", "head", "score", "", "in the word", "elsewhere", "effect size", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.sort_values("rank").head(_MAX_HEADS).to_dict("records"):
        table.add_row(
            *[str(row[name]) for name in ("rank", "layer", "head")],
            f"{row['score']:.3f}",
            f"± {row['score_sem']:.3f}",
            f"{row['in_word']:.3f}",
            f"{row['elsewhere']:.3f}",
            f"{row['effect_size']:.2f}",
            f"{row['effect_size_held_out']:.2f}",
        )
    yield table


def _probe_table(frame: pd.DataFrame) -> Iterator[Table]:
    """Yield a table of the probes and their held-out accuracy."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("predictor", no_wrap=True)
    for heading in ("neurons", "held out, %", "95 %", "class, %", "rest, %", "windows"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        percent = {name: f"{100 * row[name]:.1f}" for name in ("accuracy", "low", "high", "on_class", "on_rest")}
        table.add_row(
            str(row["probe"]),
            "-" if math.isnan(_float(row["k"])) else str(row["k"]),
            percent["accuracy"],
            f"{percent['low']}-{percent['high']}",
            percent["on_class"],
            percent["on_rest"],
            f"{row['held_out']:,}",
        )
    yield table


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # pandas.NA
        return math.nan


def show_analysis(run: Run, console: Console) -> None:
    """Print the results of a finished analysis."""
    from layersurgery.analyses.descriptions import describe
    from layersurgery.runs.tables import read_results, table_names

    facts = run.facts
    names = [name for name in table_names(facts) if name != "neuron_scores"]
    frames = {name: read_results(run.directory, name) for name in names}
    value: dict[str, Any] = {
        "path": str(run.directory),
        "finished": True,
        **{
            name: facts[name]
            for name in (
                "model",
                "text",
                "windows",
                "pairs",
                "class",
                "seconds",
                "tokens_per_second",
                "skipped",
                "non_finite",
            )
            if name in facts
        },
        "tables": {
            name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in frames.items()
        },
    }
    first = names[0]
    items: list[Any] = [*lines(first, frames[first], console.out.width)]
    if first == "stages":
        value["boundaries"] = frames[first].attrs["boundaries"]
    if summary := facts.get("summary") or describe(first, frames):
        value["summary"] = summary
        items += ["", *(escape(line) for line in textwrap.wrap(summary, _WRAP_WIDTH))]
    items += ["", *_notes(facts)]
    files = [*facts["files"], *facts["figures"]]
    items.append(escape(f"Results are in {run.directory}: {', '.join(files)}"))
    console.result(value, *items, written=run.directory)


def _notes(facts: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in facts["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield escape(f"Skipped: {format_list(names)}: {reason}")
    for name, batches in list(facts.get("non_finite", {}).items())[:8]:
        numbers = ", ".join(map(str, batches[:8]))
        yield f"[bold red]Not finite:[/] {escape(name)} gave NaN or infinity in batch {numbers}"
    if facts.get("figure_error"):
        yield escape(f"No figure could be drawn: {facts['figure_error']}")
    if "text" in facts:
        yield run_cost(facts)
