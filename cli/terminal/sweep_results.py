"""Print the results of a sweep: tables with bars, and sparklines over depth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .charts import BAR_WIDTH, bar_cell, sparkline
from .console import Console

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

_FACTS = ("model", "text", "schedule", "batch_size", "seconds", "tokens_per_second", "skipped", "non_finite")
_BY_LAYER = ("swap", "drop", "skip-attention", "skip-mlp", "drop-span")
_MAX_ROWS = 40


def lines(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """Yield tables of all edits, and a sparkline over depth for each family."""
    base = frame[frame.edit == "none"].iloc[0]
    yield (
        f"\nUnedited: loss {base.loss_nats:.3f} nats (perplexity {math.exp(min(base.loss_nats, 700)):.4g}), entropy "
        f"{base.entropy_bits:.2f} bits, accuracy {100 * base.accuracy:.1f} %\n"
    )
    families = [edit for edit in _BY_LAYER if (frame.edit == edit).any()]
    # If spans have several lengths, one layer starts several of them, so they are listed in a separate table.
    spans = frame[frame.edit == "drop-span"]
    if spans.layer.duplicated().any():
        families = [family for family in families if family != "drop-span"]
    if families:
        yield _layer_table(frame, families)
        yield ""
        for family in families:
            rows = frame[frame.edit == family].sort_values("layer")
            for metric, label in (("kl_nats", "KL, log scale"), ("agreement", "predictions kept")):
                yield Text(
                    f"{family:>14} {label:<16} {sparkline(rows[metric].tolist(), log=metric == 'kl_nats')}",
                    no_wrap=True,
                )
    others = frame[
        frame.edit.isin(["swap-pairs", "plan"]) | ((frame.edit == "drop-span") & ("drop-span" not in families))
    ]
    if len(others):
        yield _edit_table(others)


def _layer_table(frame: pd.DataFrame, families: Sequence[str]) -> Table:
    """Return a table with a row for each layer; with more than two families, only KL and agreement fit."""
    wide = len(families) <= 2
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayer", justify="right", no_wrap=True)
    for family in families:
        table.add_column(f"{family}\nKL", justify="right", no_wrap=True)
        if wide:
            table.add_column("", width=BAR_WIDTH, no_wrap=True)
        table.add_column("\nkept", justify="right", no_wrap=True)
        if wide:
            table.add_column("\nentropy", justify="right", no_wrap=True)
    rows_of = {family: frame[frame.edit == family].set_index("layer") for family in families}
    max_kl = frame[frame.edit.isin(families)].kl_nats.max()
    for layer in sorted({layer for rows in rows_of.values() for layer in rows.index}):
        cells = [str(layer)]
        for family in families:
            cells += (
                _cells(rows_of[family].loc[layer], max_kl, wide)
                if layer in rows_of[family].index
                else [""] * (4 if wide else 2)
            )
        table.add_row(*cells)
    return table


def _cells(row: pd.Series, max_kl: float, wide: bool) -> list[str]:
    cells = [f"{row.kl_nats:.3f}", f"{100 * row.agreement:.1f} %"]
    return [cells[0], bar_cell(row.kl_nats, max_kl), cells[1], f"{row.entropy_change_bits:+.2f}"] if wide else cells


def _edit_table(rows: pd.DataFrame) -> Table:
    ordered = rows.sort_values("kl_nats")
    skipped = max(0, len(ordered) - _MAX_ROWS)
    title = f"The {_MAX_ROWS} edits with the lowest KL, of {len(ordered)}; results.csv has all" if skipped else None
    table = Table(box=None, pad_edge=False, header_style="bold", caption=title, caption_justify="left")
    for name, right in (("plan", False), ("KL", True), ("", False), ("kept", True), ("entropy", True), ("loss", True)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in ordered.head(_MAX_ROWS).itertuples():
        table.add_row(
            Text(row.name),
            f"{row.kl_nats:.3f}",
            bar_cell(row.kl_nats, ordered.kl_nats.max()),
            f"{100 * row.agreement:.1f} %",
            f"{row.entropy_change_bits:+.2f}",
            f"{row.loss_change_nats:+.3f}",
        )
    return table


def show_sweep(run: Run, console: Console) -> None:
    """Print the results of a finished sweep."""
    from layersurgery.runs.tables import read_results
    from layersurgery.sweeps.results import summary_sentence

    frame = read_results(run.directory)
    facts = run.facts
    result = {
        "path": str(run.directory),
        "finished": True,
        **{name: facts[name] for name in _FACTS},
        "summary": summary_sentence(frame),
        "results": _records(frame),
    }
    files = [
        "results.parquet",
        "results.csv",
        *(["tokens.parquet"] if facts["arguments"]["per_token"] else []),
        *facts["figures"],
    ]
    items = [*lines(frame)]
    for plan, batches in facts["non_finite"].items():
        numbers = ", ".join(map(str, batches[:8])) + (" ..." if len(batches) > 8 else "")
        items.append(
            f"[bold red]Not finite:[/] {escape(plan)} gave NaN or infinity in batch {numbers}; its row contains NaN"
        )
    if facts.get("figure_error"):
        items.append(escape(f"No figure could be drawn: {facts['figure_error']}"))
    if sentence := summary_sentence(frame):
        items.append(f"\n[bold]{escape(sentence[0].upper() + sentence[1:])}[/]")
    items.append(
        f"{facts['text']['tokens']:,} tokens in {facts['seconds']:,.0f} s "
        f"({facts['tokens_per_second']:,.0f} tokens/s through every edit)"
    )
    items.append(escape(f"Wrote {run.directory}: {', '.join(files)}"))
    console.result(result, *items)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return records
