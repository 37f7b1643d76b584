"""Print the results of a sweep: tables with bars, and sparklines over depth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from layersurgery.plans.families import FAMILIES
from layersurgery.registry import METRICS, PROPAGATION, TAILS, Column

from .charts import BAR_WIDTH, bar_cell, number_cell, sparkline
from .console import Console
from .run_cost import run_cost
from .task_results import task_table

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

_FACTS = (
    "model",
    "text",
    "schedule",
    "stopping",
    "batch_size",
    "seconds",
    "tokens_per_second",
    "skipped",
    "non_finite",
)
_MAX_ROWS = 40
_MAX_NAME = 24
_GAP = 2  # between the columns of a table


def lines(frame: pd.DataFrame, width: int = 80) -> Iterator[str | Table | Text]:
    """Yield tables of all edits, and sparklines over depth for each family.

    Args:
        frame: the results.
        width: characters in a line; more metrics are shown where there is room.
    """
    base = frame[frame.edit == "none"].iloc[0]
    yield (
        f"\nUnedited: loss {base.loss_nats:.3f} nats (perplexity {math.exp(min(base.loss_nats, 700)):.4g}), entropy "
        f"{base.entropy_bits:.2f} bits, accuracy {100 * base.accuracy:.1f} %\n"
    )
    metrics = [metric for metric in METRICS if metric.shown and metric.name in frame]
    by_layer = [family.name for family in FAMILIES.values() if family.per_layer and (frame.edit == family.name).any()]
    # If spans have several lengths, one layer starts several of them, so they are listed in a separate table.
    families = [name for name in by_layer if not frame[frame.edit == name].layer.duplicated().any()]
    if families:
        yield _layer_table(frame, families, metrics, width)
        yield ""
        for family in families:
            rows = frame[frame.edit == family].sort_values("layer")
            for metric in metrics[:2]:
                label = f"{metric.heading}, log scale" if metric.log else metric.heading
                curve = sparkline(rows[metric.name].tolist(), log=metric.log)
                yield Text(f"{family:>14} {label:<13} {curve}", no_wrap=True)
    others = frame[(frame.edit != "none") & ~frame.edit.isin(families)]
    if len(others):
        yield _edit_table(others, metrics, width)
        if len(others) > _MAX_ROWS:
            yield f"The {_MAX_ROWS} edits with the lowest KL, of {len(others)}; results.csv has all"
    if all(tail.name in frame for tail in TAILS):
        edited = frame[frame.edit != "none"]
        few = f", the {_MAX_ROWS} edits with the lowest KL of {len(edited)}" if len(edited) > _MAX_ROWS else ""
        yield f"\nTails: mean, quantiles and maximum of KL over positions, and shares of predictions{few}"
        yield _edit_table(edited, [METRICS[0], *TAILS], width, 1 + len(TAILS))


def _layer_table(frame: pd.DataFrame, families: Sequence[str], metrics: Sequence[Column], width: int) -> Table:
    """Return a table with a row for each layer, and for each family as many metrics as have room."""
    rows = frame[frame.edit.isin(families)]
    first, *widths = (_width(rows, metric) for metric in metrics)
    used = len("layer") + sum(max(first, len(family)) + _GAP for family in families)
    count, has_bar = _fit(widths, (width - used) // len(families), 1)
    count += 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayer", justify="right", no_wrap=True)
    for family in families:
        _add_columns(table, metrics[:count], has_bar, f"{family}\n", "\n")
    rows_of = {family: frame[frame.edit == family].set_index("layer") for family in families}
    for layer in sorted({layer for of_family in rows_of.values() for layer in of_family.index}):
        cells = [str(layer)]
        for of_family in rows_of.values():
            cells += (
                _cells(of_family.loc[layer], metrics[:count], rows.kl_nats.max() if has_bar else None)
                if layer in of_family.index
                else [""] * (count + has_bar)
            )
        table.add_row(*cells)
    return table


def _edit_table(rows: pd.DataFrame, metrics: Sequence[Column], width: int, before_bar: int = 2) -> Table:
    """Return a table of plans, the lowest KL first, with as many metrics as have room; `before_bar` before a bar."""
    ordered = rows.sort_values("kl_nats")
    shown = ordered.head(_MAX_ROWS)
    names = min(_MAX_NAME, max(map(len, shown["name"])))
    count, has_bar = _fit([_width(shown, metric) for metric in metrics], width - names, before_bar)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan", overflow="fold")
    _add_columns(table, metrics[:count], has_bar)
    for _, row in shown.iterrows():
        table.add_row(Text(row["name"]), *_cells(row, metrics[:count], ordered.kl_nats.max() if has_bar else None))
    return table


def _width(rows: pd.DataFrame, metric: Column) -> int:
    """Return the width of a metric's column."""
    return max(len(metric.heading), *(len(number_cell(value, metric)) for value in rows[metric.name]))


def _fit(widths: Sequence[int], room: int, before_bar: int) -> tuple[int, bool]:
    """Return how many of the columns have room, and whether a bar has; a few columns are preferred to it."""
    needed = [*accumulate(width + _GAP for width in widths)]
    has_bar = needed[before_bar - 1] + BAR_WIDTH + _GAP <= room
    room -= (BAR_WIDTH + _GAP) * has_bar
    return sum(end <= room for end in needed), has_bar


def _add_columns(table: Table, metrics: Sequence[Column], has_bar: bool, first: str = "", other: str = "") -> None:
    """Add a column for each metric and one for the bar of the first, with a text before each heading."""
    for number, metric in enumerate(metrics):
        table.add_column(f"{other if number else first}{metric.heading}", justify="right", no_wrap=True)
        if has_bar and not number:
            table.add_column("", width=BAR_WIDTH, no_wrap=True)


def _cells(row: pd.Series, metrics: Sequence[Column], max_kl: float | None) -> list[str]:
    cells = [number_cell(row[metric.name], metric) for metric in metrics]
    return cells if max_kl is None else [cells[0], bar_cell(row.kl_nats, max_kl), *cells[1:]]


def show_sweep(run: Run, console: Console) -> None:
    """Print the results of a finished sweep."""
    from layersurgery.runs.tables import TASKS, has_tasks_inside, read_results, read_run
    from layersurgery.sweeps.map_sentences import describe_maps
    from layersurgery.sweeps.propagation_results import propagation_sentence
    from layersurgery.sweeps.results import precision_sentence, summary_sentence

    frame = read_results(run.directory)
    about_maps = describe_maps(frame)
    facts = run.facts
    rows = frame.attrs.get(PROPAGATION, [])
    reach = propagation_sentence(rows)
    if len(rows) and not reach:
        reach = "propagation.csv says how much what later layers add changes; it is drawn for drop and skips only"
    result = {
        "path": str(run.directory),
        "finished": True,
        **{name: value for name, value in facts.items() if name in _FACTS},
        "summary": summary_sentence(frame),
        "maps": about_maps,
        "precision": precision_sentence(frame),
        PROPAGATION: reach,
        "results": _records(frame),
    }
    files = [
        "results.parquet",
        "results.csv",
        *(file for file in facts["files"] if file.endswith("requests.parquet")),
        *(["tokens.parquet"] if facts["arguments"]["per_token"] else []),
        *(file for file in facts["files"] if file.startswith(f"{PROPAGATION}.")),
        *facts["figures"],
    ]
    items = [*lines(frame, console.out.width), *task_table(frame, console.out.width)]
    for plan, batches in facts["non_finite"].items():
        numbers = ", ".join(map(str, batches[:8])) + (" ..." if len(batches) > 8 else "")
        items.append(
            f"[bold red]Not finite:[/] {escape(plan)} gave NaN or infinity in batch {numbers}; its row contains NaN"
        )
    if facts.get("figure_error"):
        items.append(escape(f"No figure could be drawn: {facts['figure_error']}"))
    said = [sentence for sentence in (summary_sentence(frame), *about_maps) if sentence]
    items += ["", *(f"[bold]{escape(sentence[0].upper() + sentence[1:])}[/]" for sentence in said)] if said else []
    items += [escape(text[0].upper() + text[1:]) for text in (reach, precision_sentence(frame)) if text]
    items.append(run_cost(facts))
    if has_tasks_inside(facts):
        items.append(run_cost(read_run(run.directory / TASKS) or {}))
    items.append(escape(f"Wrote {run.directory}: {', '.join(files)}"))
    console.result(result, *items, written=run.directory)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return records
