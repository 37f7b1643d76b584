"""`layersurgery rank` and `layersurgery prune`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.atomic_io import check_output
from layersurgery.errors import OutputError

from ..session.figures import draw_analysis
from ..session.processes import run_task, run_tasks
from ..terminal.analysis_results import progress_line, show_analysis
from ..terminal.console import Console
from .edit import EditOptions as Writing
from .edit import as_json, edited, lines

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.analyses.signal_tables import SignalTables
    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import RunOutput
    from layersurgery.sweeps.measurer import Measurer

    from ..session.model_session import ModelSession
    from ..session.run_options import MeasureOptions


@dataclass(frozen=True, slots=True)
class _TableTask:
    """A run that ends in tables of its own."""

    depth: int

    @property
    def word(self) -> str:
        """What it is called."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """An analysis."""
        from layersurgery.runs.run_directory import ANALYSIS

        return ANALYSIS

    def outcome(self, measurer: Measurer, source: Source, _console: Console) -> RunOutput:
        """Its tables."""
        from layersurgery.analyses.outcomes import TableOutput

        return TableOutput(measurer, source.label, self.tables)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """What becomes of the sums."""
        raise NotImplementedError

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Its figures."""
        return draw_analysis(directory, run.facts)

    def extremes(self, frame: pd.DataFrame) -> str:
        """Results so far."""
        return progress_line(frame)

    def show(self, run: Run, console: Console) -> None:
        """Its tables."""
        show_analysis(run, console)


@dataclass(frozen=True, slots=True)
class RankTask(_TableTask):
    """What removing each layer costs, and two scores that guess it."""

    spans: int

    @property
    def word(self) -> str:
        """What it is called."""
        return "rank"

    def arguments(self) -> dict[str, Any]:
        """Which."""
        return {"analysis": self.word, "spans": self.spans}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Drops every layer, and sees how far the stream turns."""
        from layersurgery.analyses.layer_ranking import SIGNALS
        from layersurgery.analyses.signal_tables import measurer_of

        return measurer_of(model, SIGNALS, self.depth, blocks=options.blocks, spans=self.spans)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Layers, and spans of them."""
        from layersurgery.analyses.layer_ranking import rank_table, span_table

        return {"rank": rank_table(tables), "spans": span_table(tables)}


@dataclass(frozen=True, slots=True)
class GreedyStepTask(_TableTask):
    """The layers that are left, measured anew once some are removed."""

    by: str
    removed: tuple[int, ...]

    @property
    def word(self) -> str:
        """What it is called."""
        return "step"

    def arguments(self) -> dict[str, Any]:
        """Which."""
        return {"analysis": self.word, "by": self.by, "removed": list(self.removed)}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Measures each layer that is left."""
        from layersurgery.analyses.layer_pruning import step_measurer

        return step_measurer(model, self.by, self.removed, self.depth, blocks=options.blocks)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """A row for each layer that is left."""
        from layersurgery.analyses.layer_pruning import step_table

        return {"step": step_table(tables, self.by, self.removed)}


@dataclass(frozen=True, slots=True)
class CostTask(_TableTask):
    """What each way of choosing costs, for each number of layers."""

    orders: Mapping[str, Sequence[tuple[int, ...]]]

    @property
    def word(self) -> str:
        """What it is called."""
        return "costs"

    def arguments(self) -> dict[str, Any]:
        """Which."""
        return {
            "analysis": self.word,
            "orders": {way: [list(one) for one in order] for way, order in self.orders.items()},
        }

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Measures what is left each time."""
        from layersurgery.analyses.layer_pruning import variants_of
        from layersurgery.sweeps.measurer import Measurer

        return Measurer(model, variants_of(self.orders, self.depth), blocks=options.blocks)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """A row for each way and number of layers."""
        from layersurgery.analyses.layer_pruning import costs

        return {"costs": costs(tables.measurer, tables.sums_by_sequence.sums(), tables.model)}


def run_rank(model: str, spans: int | None, options: MeasureOptions, console: Console) -> None:
    """Measure, showing what happens, and end with the results."""
    from layersurgery.analyses.layer_ranking import max_span

    run_task(model, options, console, lambda depth: RankTask(depth, max_span(depth, spans)))


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What `prune` is asked for beside the model and the text."""

    remove: int
    by: str
    greedy: bool
    results: Path | None
    link: bool
    verify: bool


def run_prune(model: str, asked: PruneOptions, options: MeasureOptions, console: Console) -> None:
    """Choose layers, measure what that costs, and write what is left."""
    run_tasks(model, options, console, lambda session: _prune(session, asked, console))


def _prune(session: ModelSession, asked: PruneOptions, console: Console) -> None:
    from layersurgery.analyses.layer_pruning import GREEDY, check, next_removal, plan_of, removal_orders
    from layersurgery.analyses.layer_ranking import CRITERIA
    from layersurgery.runs.tables import read_results

    options = session.options
    check(session.depth, asked.remove, asked.by)
    way = f"{asked.by}{'-greedy' if asked.greedy else ''}"
    out = options.output or Path(f"{session.source.name}-prune-{asked.remove}-{way}")
    check_output(out, session.source.directory, overwrite=options.overwrite)  # now, and not after hours of measuring
    place = asked.results or out.with_name(f"{out.name}-results")
    console.log(f"Ranking {session.depth} layers")
    ranks = _carried(session, RankTask(session.depth, asked.remove), place / "rank").directory
    ranked, spans = read_results(ranks), read_results(ranks, "spans")
    ranked.attrs["skipped"] = ranked.attrs["run"]["skipped"]
    orders = {by: removal_orders(ranked, spans, asked.remove, by) for by in CRITERIA}
    if asked.greedy:
        gone: list[int] = []
        while len(gone) < asked.remove:
            console.log(f"Choosing layer {len(gone) + 1} of {asked.remove}")
            step = GreedyStepTask(session.depth, asked.by, tuple(gone))
            frame = read_results(_carried(session, step, place / f"step-{len(gone) + 1:02}").directory)
            gone.append(next_removal(frame, asked.by, gone))
            score = float(frame.set_index("layer")[CRITERIA[asked.by]][gone[-1]])
            console.log(f"Layer {gone[-1]} goes ({CRITERIA[asked.by]} {score:.3g})")
        orders[GREEDY] = [tuple(gone[:count]) for count in range(1, asked.remove + 1)]
    console.log("Measuring what each way of choosing costs")
    run = _carried(session, CostTask(session.depth, orders), place / "costs")
    frame = read_results(run.directory)
    layers = orders[GREEDY if asked.greedy else asked.by][-1]
    plan = plan_of(layers)
    writing = Writing(out, options.overwrite, asked.link, asked.verify, options.revision, options.blocks)
    [result], source = edited({None: plan}, session.model, writing, console)
    before, after = frame.iloc[0], _row(frame, GREEDY if asked.greedy else asked.by, asked.remove)
    value = {
        **as_json(result, source.label, source.revision),
        "by": asked.by,
        "greedy": asked.greedy,
        "layers": list(layers),
        "before": _numbers(before),
        "after": _numbers(after),
        "results": str(place),
        "costs": json.loads(frame.drop(columns=["model"]).to_json(orient="records", double_precision=15)),
    }
    shown: list[Any] = [_table(frame, orders), *_words(layers, before, after, asked)]
    figures = [str(name) for name in run.facts["figures"]]
    shown += [escape(line) for line in (*lines(result), f"What was measured is in {place}: {', '.join(figures)}")]
    console.result(value, *shown)


def _carried(session: ModelSession, task: Any, directory: Path) -> Run:
    """Measured already, or now; what was measured otherwise is replaced if outputs may be."""
    try:
        return session.run(task, directory, anew=False)
    except OutputError:
        if not session.options.overwrite:
            raise
        return session.run(task, directory, anew=True)


def _row(frame: pd.DataFrame, way: str, removed: int) -> pd.Series | None:
    rows = frame[(frame.criterion == way) & (frame.removed == removed)]
    return None if rows.empty else rows.iloc[0]


def _numbers(row: pd.Series | None) -> dict[str, float] | None:
    names = ("perplexity", "loss_nats", "kl_nats", "agreement", "accuracy", "entropy_bits")
    return None if row is None else {name: float(row[name]) for name in names}


def _table(frame: pd.DataFrame, orders: Mapping[str, Sequence[tuple[int, ...]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers\nremoved", justify="right")
    for way in orders:
        table.add_column(f"{way}\nKL", justify="right", no_wrap=True)
        table.add_column("\nppl.", justify="right", no_wrap=True)
    for removed in range(max(map(len, orders.values())) + 1):
        rows = [_row(frame, way, removed) if removed else frame.iloc[0] for way in orders]
        table.add_row(str(removed), *[cell for row in rows for cell in _cells(row)])
    return table


def _cells(row: pd.Series | None) -> list[str]:
    return ["-", "-"] if row is None else [f"{row.kl_nats:.3f}", f"{row.perplexity:.4g}"]


def _words(layers: Sequence[int], before: pd.Series, after: pd.Series | None, asked: PruneOptions) -> Iterator[str]:
    order = f"Layer {layers[0]} goes" if len(layers) == 1 else f"Layers {', '.join(map(str, layers))} go"
    how = (
        "measured anew after each removal"
        if asked.greedy
        else "as one span"
        if asked.by == "angular"
        else "each by itself"
    )
    yield f"\n{order}, chosen by {asked.by}, {how}"
    if after is None:
        yield "Without them the model could not be measured in memory"
        return
    yield (
        f"[bold]Perplexity {before.perplexity:.4g} before, {after.perplexity:.4g} after[/]; KL {after.kl_nats:.3g} nats, "
        f"{100 * after.agreement:.1f} % of predictions kept ({int(after.tokens):,} tokens)"
    )
