"""Results of sweeps on a terminal: numbers with bars, and curves in a line; and their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .charts import _WIDTH, bar_cell, sparkline
from .console import Console

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

_BY_LAYER = ("swap", "drop", "skip-attention", "skip-mlp", "drop-span")
_MOST_ROWS = 40


def lines(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """The table, family by family, and a curve over depth for each."""
    base = frame[frame.edit == "none"].iloc[0]
    yield (
        f"\nUnedited: loss {base.loss_nats:.3f} nats (perplexity {math.exp(min(base.loss_nats, 700)):.4g}), entropy "
        f"{base.entropy_bits:.2f} bits, accuracy {100 * base.accuracy:.1f} %\n"
    )
    kinds = [edit for edit in _BY_LAYER if (frame.edit == edit).any()]
    # Spans of several lengths stand in a list of their own, as one layer may begin several of them.
    spans = frame[frame.edit == "drop-span"]
    if spans.layer.duplicated().any():
        kinds = [kind for kind in kinds if kind != "drop-span"]
    if kinds:
        yield _by_layer(frame, kinds)
        yield ""
        for kind in kinds:
            rows = frame[frame.edit == kind].sort_values("layer")
            for metric, words in (("kl_nats", "KL, log scale"), ("agreement", "predictions kept")):
                yield Text(
                    f"{kind:>14} {words:<16} {sparkline(rows[metric].tolist(), log=metric == 'kl_nats')}", no_wrap=True
                )
    others = frame[frame.edit.isin(["swap-pairs", "plan"]) | ((frame.edit == "drop-span") & ("drop-span" not in kinds))]
    if len(others):
        yield _listed(others)


def _by_layer(frame: pd.DataFrame, kinds: Sequence[str]) -> Table:
    """A row for each layer; with more than two kinds of edits there is room for KL and what is kept only."""
    wide = len(kinds) <= 2
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayer", justify="right", no_wrap=True)
    for kind in kinds:
        table.add_column(f"{kind}\nKL", justify="right", no_wrap=True)
        if wide:
            table.add_column("", width=_WIDTH, no_wrap=True)
        table.add_column("\nkept", justify="right", no_wrap=True)
        if wide:
            table.add_column("\nentropy", justify="right", no_wrap=True)
    by = {kind: frame[frame.edit == kind].set_index("layer") for kind in kinds}
    most = frame[frame.edit.isin(kinds)].kl_nats.max()
    for layer in sorted({layer for rows in by.values() for layer in rows.index}):
        cells = [str(layer)]
        for kind in kinds:
            cells += _cells(by[kind].loc[layer], most, wide) if layer in by[kind].index else [""] * (4 if wide else 2)
        table.add_row(*cells)
    return table


def _cells(row: pd.Series, most: float, wide: bool) -> list[str]:
    cells = [f"{row.kl_nats:.3f}", f"{100 * row.agreement:.1f} %"]
    return [cells[0], bar_cell(row.kl_nats, most), cells[1], f"{row.entropy_change_bits:+.2f}"] if wide else cells


def _listed(rows: pd.DataFrame) -> Table:
    ordered = rows.sort_values("kl_nats")
    skipped = max(0, len(ordered) - _MOST_ROWS)
    title = f"The {_MOST_ROWS} mildest of {len(ordered)}; all are in results.csv" if skipped else None
    table = Table(box=None, pad_edge=False, header_style="bold", caption=title, caption_justify="left")
    for name, right in (("plan", False), ("KL", True), ("", False), ("kept", True), ("entropy", True), ("loss", True)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in ordered.head(_MOST_ROWS).itertuples():
        table.add_row(
            Text(row.name), f"{row.kl_nats:.3f}", bar_cell(row.kl_nats, ordered.kl_nats.max()), f"{100 * row.agreement:.1f} %",
            f"{row.entropy_change_bits:+.2f}", f"{row.loss_change_nats:+.3f}",
        )  # fmt: skip
    return table


def show_sweep(run: Run, console: Console) -> None:
    """The results of a finished run."""
    from layersurgery.runs.tables import read_results
    from layersurgery.sweeps.results import summary_sentence

    frame = read_results(run.directory)
    facts = run.facts
    value = {
        "path": str(run.directory),
        "finished": True,
        **{name: facts[name] for name in ("model", "text", "schedule", "batch_size", "seconds", "tokens_per_second", "skipped", "non_finite")},
        "summary": summary_sentence(frame),
        "results": _records(frame),
    }  # fmt: skip
    files = [
        "results.parquet",
        "results.csv",
        *(["tokens.parquet"] if facts["arguments"]["per_token"] else []),
        *facts["figures"],
    ]
    shown = [*lines(frame)]
    for plan, batches in facts["non_finite"].items():
        where = ", ".join(map(str, batches[:8])) + (" ..." if len(batches) > 8 else "")
        shown.append(
            f"[bold red]Not numbers:[/] {escape(plan)} gave NaN or infinity in batch {where}; its row says NaN"
        )
    if facts.get("figure_error"):
        shown.append(escape(f"No figure could be drawn: {facts['figure_error']}"))
    if sentence := summary_sentence(frame):
        shown.append(f"\n[bold]{escape(sentence[0].upper() + sentence[1:])}[/]")
    shown.append(
        f"{facts['text']['tokens']:,} tokens in {facts['seconds']:,.0f} s ({facts['tokens_per_second']:,.0f} tokens/s through every edit)"
    )
    shown.append(escape(f"Wrote {run.directory}: {', '.join(files)}"))
    console.result(value, *shown)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=15))
    return records
