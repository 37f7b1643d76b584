"""Run `layersurgery rank` and `layersurgery prune`."""

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
from .edit import EditOptions, as_json, describe_result, write_edits

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.analyses.signal_tables import SignalTables
    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import RunOutput
    from layersurgery.sweeps.measurer import Measurer

    from ..session.model_session import ModelSession
    from ..session.run_options import MeasureOptions

_CRITERION_NAMES = {"kl": "KL", "influence": "block influence", "angular": "angular distance"}


@dataclass(frozen=True, slots=True)
class _TableTask:
    """Base of the measurements whose results are tables."""

    depth: int

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """Return the kind of result directory: an analysis."""
        from layersurgery.runs.run_directory import ANALYSIS

        return ANALYSIS

    def output(self, measurer: Measurer, source: Source, _console: Console) -> RunOutput:
        """Make the output: this task's tables."""
        from layersurgery.analyses.outcomes import TableOutput

        return TableOutput(measurer, source.label, self.tables)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make the tables from the measured sums."""
        raise NotImplementedError

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""
        return draw_analysis(directory, run.facts)

    def summarize(self, frame: pd.DataFrame) -> str:
        """Summarize the results so far."""
        return progress_line(frame)

    def show(self, run: Run, console: Console) -> None:
        """Print the tables."""
        show_analysis(run, console)


@dataclass(frozen=True, slots=True)
class RankTask(_TableTask):
    """Cost of removing each layer, and two scores that predict it."""

    spans: int

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "rank"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        return {"analysis": self.name, "spans": self.spans}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer: it drops every layer, and measures angular distances over spans."""
        from layersurgery.analyses.layer_ranking import SIGNALS
        from layersurgery.analyses.signal_tables import measurer_of

        return measurer_of(model, SIGNALS, self.depth, blocks=options.blocks, spans=self.spans)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make the tables of layers and of spans."""
        from layersurgery.analyses.layer_ranking import rank_table, span_table

        return {"rank": rank_table(tables), "spans": span_table(tables)}


@dataclass(frozen=True, slots=True)
class GreedyStepTask(_TableTask):
    """One step of greedy pruning: the remaining layers, measured after some are removed."""

    by: str
    removed: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "step"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        return {"analysis": self.name, "by": self.by, "removed": list(self.removed)}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer of each remaining layer."""
        from layersurgery.analyses.layer_pruning import step_measurer

        return step_measurer(model, self.by, self.removed, self.depth, blocks=options.blocks)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each remaining layer."""
        from layersurgery.analyses.layer_pruning import step_table

        return {"step": step_table(tables, self.by, self.removed)}


@dataclass(frozen=True, slots=True)
class CostTask(_TableTask):
    """Cost of each criterion, for each number of removed layers."""

    orders: Mapping[str, Sequence[tuple[int, ...]]]

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "costs"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        return {
            "analysis": self.name,
            "orders": {criterion: [list(layers) for layers in order] for criterion, order in self.orders.items()},
        }

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer of all pruned models."""
        from layersurgery.analyses.layer_pruning import variants_of
        from layersurgery.sweeps.measurer import Measurer

        return Measurer(model, variants_of(self.orders, self.depth), blocks=options.blocks)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each criterion and number of layers."""
        from layersurgery.analyses.layer_pruning import costs

        return {"costs": costs(tables.measurer, tables.sums_by_sequence.sums(), tables.model)}


def run_rank(model: str, spans: int | None, options: MeasureOptions, console: Console) -> None:
    """Rank the layers, show the progress, and print the results."""
    from layersurgery.analyses.layer_ranking import max_span

    run_task(model, options, console, lambda depth: RankTask(depth, max_span(depth, spans)))


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Options of `prune` other than those of measuring."""

    remove: int
    by: str
    greedy: bool
    results: Path | None
    link: bool
    verify: bool


def run_prune(model: str, prune_options: PruneOptions, options: MeasureOptions, console: Console) -> None:
    """Choose the layers to remove, measure the cost, and write the pruned checkpoint."""
    run_tasks(model, options, console, lambda session: _prune(session, prune_options, console))


def _prune(session: ModelSession, prune_options: PruneOptions, console: Console) -> None:
    from layersurgery.analyses.layer_pruning import GREEDY, check, next_removal, plan_of, removal_orders
    from layersurgery.analyses.layer_ranking import CRITERIA
    from layersurgery.runs.tables import read_results

    options = session.options
    check(session.depth, prune_options.remove, prune_options.by)
    criterion = f"{prune_options.by}{'-greedy' if prune_options.greedy else ''}"
    out = options.output or Path(f"{session.source.name}-prune-{prune_options.remove}-{criterion}")
    check_output(out, session.source.directory, overwrite=options.overwrite)  # before hours of measuring
    directory = prune_options.results or out.with_name(f"{out.name}-results")
    console.log(f"Ranking {session.depth} layers")
    rank_directory = _run_or_reuse(session, RankTask(session.depth, prune_options.remove), directory / "rank").directory
    ranks, spans = read_results(rank_directory), read_results(rank_directory, "spans")
    ranks.attrs["skipped"] = ranks.attrs["run"]["skipped"]
    orders = {by: removal_orders(ranks, spans, prune_options.remove, by) for by in CRITERIA}
    if prune_options.greedy:
        removed: list[int] = []
        while len(removed) < prune_options.remove:
            console.log(f"Choosing layer {len(removed) + 1} of {prune_options.remove}")
            step = GreedyStepTask(session.depth, prune_options.by, tuple(removed))
            frame = read_results(_run_or_reuse(session, step, directory / f"step-{len(removed) + 1:02}").directory)
            removed.append(next_removal(frame, prune_options.by, removed))
            score = float(frame.set_index("layer")[CRITERIA[prune_options.by]][removed[-1]])
            console.log(f"Removing layer {removed[-1]} ({CRITERIA[prune_options.by]} {score:.3g})")
        orders[GREEDY] = [tuple(removed[:count]) for count in range(1, prune_options.remove + 1)]
    console.log("Measuring the cost of each criterion")
    run = _run_or_reuse(session, CostTask(session.depth, orders), directory / "costs")
    frame = read_results(run.directory)
    layers = orders[GREEDY if prune_options.greedy else prune_options.by][-1]
    plan = plan_of(layers)
    edit_options = EditOptions(
        out, options.overwrite, prune_options.link, prune_options.verify, options.revision, options.blocks
    )
    [result], source = write_edits({None: plan}, session.model, edit_options, console)
    before, after = (
        frame.iloc[0],
        _row(frame, GREEDY if prune_options.greedy else prune_options.by, prune_options.remove),
    )
    value = {
        **as_json(result, source.label, source.revision),
        "by": prune_options.by,
        "greedy": prune_options.greedy,
        "layers": list(layers),
        "before": _numbers(before),
        "after": _numbers(after),
        "results": str(directory),
        "costs": json.loads(frame.drop(columns=["model"]).to_json(orient="records", double_precision=15)),
    }
    lines: list[Any] = [_table(frame, orders), *_describe_cost(layers, before, after, prune_options)]
    figures = [str(name) for name in run.facts["figures"]]
    lines += [
        escape(line)
        for line in (*describe_result(result), f"The measurements are in {directory}: {', '.join(figures)}")
    ]
    console.result(value, *lines)


def _run_or_reuse(session: ModelSession, task: Any, directory: Path) -> Run:
    """Run a measurement, or use the finished one.

    A measurement made with other arguments is replaced if --overwrite is given.
    """
    try:
        return session.run(task, directory, overwrite=False)
    except OutputError:
        if not session.options.overwrite:
            raise
        return session.run(task, directory, overwrite=True)


def _row(frame: pd.DataFrame, criterion: str, removed: int) -> pd.Series | None:
    rows = frame[(frame.criterion == criterion) & (frame.removed == removed)]
    return None if rows.empty else rows.iloc[0]


def _numbers(row: pd.Series | None) -> dict[str, float] | None:
    names = ("perplexity", "loss_nats", "kl_nats", "agreement", "accuracy", "entropy_bits")
    return None if row is None else {name: float(row[name]) for name in names}


def _table(frame: pd.DataFrame, orders: Mapping[str, Sequence[tuple[int, ...]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers\nremoved", justify="right")
    for criterion in orders:
        table.add_column(f"{criterion}\nKL", justify="right", no_wrap=True)
        table.add_column("\nppl.", justify="right", no_wrap=True)
    for removed in range(max(map(len, orders.values())) + 1):
        rows = [_row(frame, criterion, removed) if removed else frame.iloc[0] for criterion in orders]
        table.add_row(str(removed), *[cell for row in rows for cell in _cells(row)])
    return table


def _cells(row: pd.Series | None) -> list[str]:
    return ["-", "-"] if row is None else [f"{row.kl_nats:.3f}", f"{row.perplexity:.4g}"]


def _describe_cost(
    layers: Sequence[int], before: pd.Series, after: pd.Series | None, prune_options: PruneOptions
) -> Iterator[str]:
    numbers = f"layer{'s'[: len(layers) != 1]} {', '.join(map(str, layers))}"
    method = (
        "measured again after each removal"
        if prune_options.greedy
        else "as one span"
        if prune_options.by == "angular"
        else "measured one layer at a time"
    )
    yield f"\nRemoved {numbers} (criterion: {_CRITERION_NAMES[prune_options.by]}, {method})"
    if after is None:
        yield "The pruned model was not measured: there was not enough memory"
        return
    yield (
        f"[bold]Perplexity {before.perplexity:.4g} before, {after.perplexity:.4g} after[/]; "
        f"KL {after.kl_nats:.3g} nats, {100 * after.agreement:.1f} % of predictions kept ({int(after.tokens):,} tokens)"
    )
