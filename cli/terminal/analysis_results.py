"""Results of analyses on a terminal: a table with curves, and for the stages what they say."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .charts import bar_cell, sparkline
from .console import Console

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

# What is shown of each table: column, heading, factor, digits, whether with a bar and a curve.
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
_GUESSES = {"block influence (ShortGPT)": "block_influence", "angular distance (Gromov et al.)": "angular_distance"}
_BARS_UP_TO = 3
_HEADS = 10
_WRAP = 110


def progress_line(frame: pd.DataFrame) -> str:
    """A table so far, in a line."""
    for columns in _SHOWN.values():
        name, heading, times, _, _ = columns[0]
        if name in frame:
            return f"{heading} {sparkline((times * frame[name]).tolist())}"
    return f"self {sparkline(frame[frame.part == 'block'].self.tolist())}" if "part" in frame else ""


def lines(name: str, frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    """One table and its curves over depth."""
    yield ""
    if name == "similarity":
        yield from _similarity(frame)
        return
    if name == "subjoiners":
        yield from _heads(frame)
        return
    if name == "probe":
        yield from _probes(frame)
        return
    if name not in _SHOWN:
        return
    columns = [column for column in _SHOWN[name] if column[0] in frame]
    barred = [column for column in columns if column[4]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column[1], justify="right", no_wrap=True)
        if column in barred and len(barred) <= _BARS_UP_TO:
            table.add_column("", width=8, no_wrap=True)
    for row in frame.to_dict("records"):
        cells = [str(row["layer"])]
        for column in columns:
            key, _, times, digits, _ = column
            value = _float(row[key])
            cells.append("-" if math.isnan(value) else f"{times * value:.{digits}f}")
            if column in barred and len(barred) <= _BARS_UP_TO:
                cells.append(bar_cell(value, frame[key].astype(float).max()))
        table.add_row(*cells)
    yield table
    yield ""
    for key, heading, *_ in barred:
        label = {"%": key.partition("_")[0]}.get(heading, heading)
        yield Text(f"{label:>16} {sparkline([_float(value) for value in frame[key]], log=key in _LOG)}", no_wrap=True)


def _similarity(frame: pd.DataFrame) -> Iterator[str | Table | Text]:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nlayers", justify="right", no_wrap=True)
    parts = ("attention", "mlp", "block")
    for part in parts:
        for kind in ("self", "index", "adj."):
            table.add_column(f"{part if kind == 'self' else ''}\n{kind}", justify="right", no_wrap=True)
    by = frame.set_index(["layer", "part"])
    for layer in dict.fromkeys(frame.layer):
        values = [_float(by.loc[(layer, part), kind]) for part in parts for kind in ("self", "index", "adjacent")]
        table.add_row(f"{layer} {layer + 1}", *["-" if math.isnan(value) else f"{value:.2f}" for value in values])
    yield table
    yield ""
    for part in parts:
        yield Text(f"{part:>10}, self {sparkline(frame[frame.part == part].self.tolist())}", no_wrap=True)


def _heads(frame: pd.DataFrame) -> Iterator[Table]:
    """The heads with the highest scores."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "layer", "head", "score", "", "in the word", "elsewhere", "effect size", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.sort_values("rank").head(_HEADS).to_dict("records"):
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


def _probes(frame: pd.DataFrame) -> Iterator[Table]:
    """What tells the class, and how well."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("told by", no_wrap=True)
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
    except (TypeError, ValueError):  # pandas' NA
        return math.nan


def show_analysis(run: Run, console: Console) -> None:
    """The results of a finished run."""
    from layersurgery.runs.tables import read_results, tables_in

    facts = run.facts
    names = [name for name in tables_in(facts) if name != "neuron_scores"]
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
    shown: list[Any] = [*lines(first, frames[first])]
    if first == "stages":
        from layersurgery.analyses import describe_stages

        words = describe_stages(frames[first])
        value |= {"boundaries": frames[first].attrs["boundaries"], "summary": words}
        shown += ["", *(escape(line) for line in textwrap.wrap(words, _WRAP))]
    elif "summary" in facts:
        value["summary"] = facts["summary"]
        shown += ["", *(escape(line) for line in textwrap.wrap(facts["summary"], _WRAP))]
    if first == "rank":
        shown += ["", *_of_ranks(frames["rank"], frames["spans"])]
    shown += ["", *_notes(facts)]
    files = [*facts["files"], *facts["figures"]]
    shown.append(escape(f"Results are in {run.directory}: {', '.join(files)}"))
    console.result(value, *shown)


def _of_ranks(frame: pd.DataFrame, spans: pd.DataFrame) -> Iterator[str]:
    least = frame.dropna(subset=["kl_nats"]).sort_values("kl_nats").layer[:6]
    yield f"[bold]Missed least, measured: {', '.join(map(str, least))}[/] (each dropped by itself)"
    guessed = {name: frame.sort_values(column).layer[:6] for name, column in _GUESSES.items()}
    for name, layers in guessed.items():
        found = len(set(layers) & set(least))
        yield f"By {name}: {', '.join(map(str, layers))} ({found} of {len(least)} the same)"
    rows = spans.dropna(subset=["angular_distance"])
    if len(rows):
        best = rows.loc[rows.groupby("span").angular_distance.idxmin()].head(8)
        words = (f"{row.layer}:{row.layer + row.span}" for row in best.itertuples())
        yield f"Spans over which the stream turns least: {', '.join(words)}"


def _notes(facts: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for what, why in facts["skipped"].items():
        reasons.setdefault(why, []).append(what)
    for why, whats in reasons.items():
        more = f" and {len(whats) - 1} more" if len(whats) > 1 else ""
        yield escape(f"Left out: {whats[0]}{more}: {why}")
    for what, batches in list(facts.get("non_finite", {}).items())[:8]:
        yield f"[bold red]Not numbers:[/] {escape(what)} gave NaN or infinity in batch {', '.join(map(str, batches[:8]))}"
    if facts.get("figure_error"):
        yield escape(f"No figure could be drawn: {facts['figure_error']}")
    if "text" in facts:
        yield f"{facts['text']['tokens']:,} tokens in {facts['seconds']:,.0f} s ({facts['tokens_per_second']:,.0f} tokens/s)"
