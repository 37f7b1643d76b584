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

from layersurgery.units import format_list

from .charts import BAR_WIDTH, bar_cell, sparkline
from .console import Console

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

# The columns shown of each table: column, heading, factor, digits, whether it gets a bar and a sparkline.
_SHOWN: dict[str, tuple[tuple[str, str, float, int, bool], ...]] = {
    "lens": (
        ("lens_kl_nats", "KL to the end", 1, 3, True),
        ("lens_entropy_bits", "entropy, bits", 1, 2, True),
        ("lens_agreement", "top token, %", 100, 1, True),
    ),
    "attention": (
        ("attention_prev5", "on previous 5", 1, 3, True),
        ("attention_prev5_mean", "mean of each", 1, 4, False),
    ),
    "norms": (
        ("attention_norm", "attention", 1, 2, True),
        ("mlp_norm", "MLP", 1, 2, True),
        ("attention_to_mlp_ratio", "ratio", 1, 3, True),
    ),
    "neurons": (
        ("prediction", "prediction", 1, 0, False),
        ("prediction_percent", "%", 1, 2, True),
        ("suppression", "suppression", 1, 0, False),
        ("suppression_percent", "%", 1, 2, True),
        ("partition", "partition", 1, 0, False),
    ),
    "rank": (
        ("kl_nats", "drop KL", 1, 3, True),
        ("agreement", "kept, %", 100, 1, False),
        ("block_influence", "influence", 1, 4, False),
        ("angular_distance", "angular", 1, 4, False),
        ("kl_rank", "rank: KL", 1, 0, False),
        ("influence_rank", "infl.", 1, 0, False),
        ("angular_rank", "ang.", 1, 0, False),
    ),
    "stages": (
        ("drop_kl_nats", "drop KL", 1, 3, True),
        ("attention_prev5", "prev. 5", 1, 3, True),
        ("lens_kl_nats", "lens KL", 1, 2, True),
        ("lens_entropy_bits", "entropy", 1, 2, True),
        ("attention_to_mlp_ratio", "attn/MLP", 1, 2, True),
        ("prediction_percent", "pred. %", 1, 2, True),
        ("suppression_percent", "suppr. %", 1, 2, True),
    ),
}
_LOG = ("drop_kl_nats", "kl_nats", "block_influence")
_SCORES = {"block influence (ShortGPT)": "block_influence", "angular distance (Gromov et al.)": "angular_distance"}
_MAX_BAR_COLUMNS = 3
_MAX_HEADS = 10
_WRAP_WIDTH = 110


def progress_line(frame: pd.DataFrame) -> str:
    """Summarize a table of results so far in one line."""
    for columns in _SHOWN.values():
        name, heading, factor, _, _ = columns[0]
        if name in frame:
            return f"{heading} {sparkline((factor * frame[name]).tolist())}"
    return f"self {sparkline(frame[frame.part == 'block'].self.tolist())}" if "part" in frame else ""


def lines(name: str, frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """Yield one table and its sparklines over depth."""
    yield ""
    if name == "similarity":
        yield from _similarity_tables(frame)
        return
    if name == "subjoiners":
        yield from _head_table(frame)
        return
    if name == "probe":
        yield from _probe_table(frame)
        return
    if name not in _SHOWN:
        return
    columns = [column for column in _SHOWN[name] if column[0] in frame]
    bar_columns = [column for column in columns if column[4]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column[1], justify="right", no_wrap=True)
        if column in bar_columns and len(bar_columns) <= _MAX_BAR_COLUMNS:
            table.add_column("", width=BAR_WIDTH, no_wrap=True)
    for row in frame.to_dict("records"):
        cells = [str(row["layer"])]
        for column in columns:
            key, _, factor, digits, _ = column
            value = _float(row[key])
            cells.append("-" if math.isnan(value) else f"{factor * value:.{digits}f}")
            if column in bar_columns and len(bar_columns) <= _MAX_BAR_COLUMNS:
                cells.append(bar_cell(value, frame[key].astype(float).max()))
        table.add_row(*cells)
    yield table
    yield ""
    for key, heading, *_ in bar_columns:
        label = {"%": key.partition("_")[0]}.get(heading, heading)
        yield Text(f"{label:>16} {sparkline([_float(value) for value in frame[key]], log=key in _LOG)}", no_wrap=True)


def _similarity_tables(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayers", justify="right", no_wrap=True)
    branches = ("attention", "mlp", "block")
    for branch in branches:
        for measure in ("self", "index", "adj."):
            table.add_column(f"{branch if measure == 'self' else ''}\n{measure}", justify="right", no_wrap=True)
    rows_of = frame.set_index(["layer", "part"])
    for layer in dict.fromkeys(frame.layer):
        values = [
            _float(rows_of.loc[(layer, branch), measure])
            for branch in branches
            for measure in ("self", "index", "adjacent")
        ]
        table.add_row(f"{layer} {layer + 1}", *["-" if math.isnan(value) else f"{value:.2f}" for value in values])
    yield table
    yield ""
    for branch in branches:
        yield Text(f"{branch:>10}, self {sparkline(frame[frame.part == branch].self.tolist())}", no_wrap=True)


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
    from layersurgery.runs.tables import read_results, table_names

    facts = run.facts
    names = [name for name in table_names(facts) if name != "neuron_scores"]
    frames = {name: read_results(run.directory, name) for name in names}
    value: dict[str, Any] = {
        "path": str(run.directory),
        "finished": True,
        **{
            name: facts[name]
            for name in ("model", "text", "windows", "class", "seconds", "tokens_per_second", "skipped", "non_finite")
            if name in facts
        },
        "tables": {
            name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in frames.items()
        },
    }
    first = names[0]
    items: list[Any] = [*lines(first, frames[first])]
    if first == "stages":
        from layersurgery.analyses import describe_stages

        summary = describe_stages(frames[first])
        value |= {"boundaries": frames[first].attrs["boundaries"], "summary": summary}
        items += ["", *(escape(line) for line in textwrap.wrap(summary, _WRAP_WIDTH))]
    elif "summary" in facts:
        value["summary"] = facts["summary"]
        items += ["", *(escape(line) for line in textwrap.wrap(facts["summary"], _WRAP_WIDTH))]
    if first == "rank":
        items += ["", *_describe_ranks(frames["rank"], frames["spans"])]
    items += ["", *_notes(facts)]
    files = [*facts["files"], *facts["figures"]]
    items.append(escape(f"Results are in {run.directory}: {', '.join(files)}"))
    console.result(value, *items)


def _describe_ranks(frame: pd.DataFrame, spans: pd.DataFrame) -> Iterator[str]:
    lowest = frame.dropna(subset=["kl_nats"]).sort_values("kl_nats").layer[:6]
    yield f"[bold]Lowest KL when removed: {', '.join(map(str, lowest))}[/] (measured one layer at a time)"
    predicted = {name: frame.sort_values(column).layer[:6] for name, column in _SCORES.items()}
    for name, layers in predicted.items():
        common = len(set(layers) & set(lowest))
        yield f"Lowest {name}: {', '.join(map(str, layers))} ({common} of {len(lowest)} in common)"
    rows = spans.dropna(subset=["angular_distance"])
    if len(rows):
        best = rows.loc[rows.groupby("span").angular_distance.idxmin()].head(8)
        ranges = (f"{row.layer}:{row.layer + row.span}" for row in best.itertuples())
        yield f"Spans with the smallest angular distance: {', '.join(ranges)}"


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
        rate = f"{facts['tokens_per_second']:,.0f} tokens/s"
        yield f"{facts['text']['tokens']:,} tokens in {facts['seconds']:,.0f} s ({rate})"
