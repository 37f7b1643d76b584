"""Run analyses into directories of results: those on text, resumable, and that of the weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from ..errors import PlanError
from ..registry import ANALYSES
from ..runs.drawing import draw_analysis
from ..runs.reporter import Reporter
from ..runs.run_directory import ANALYSIS, Run
from ..runs.single_step import TablesAndFacts, run_once
from ..sweeps.measurer import Measurer
from ..sweeps.neuron_scores import neuron_scores
from ..sweeps.race import Race
from ..tasks.task_costs import TaskCosts, task_costs
from ..units import format_count
from .layer_pruning import cost_table, make_step_measurer, pruned_variants, step_table
from .layer_ranking import (
    CRITERIA,
    check_lowest,
    make_rank_measurer,
    max_span,
    rank_table,
    span_table,
    task_rank_table,
)
from .outcomes import AnalysisOutput, TableOutput
from .part_costs import PARTS, parts_table
from .prediction_neurons import neurons_per_block
from .removable_parts import BLOCKS, Part, check_kind, parts_of
from .signal_tables import SignalTables, make_measurer
from .task_criterion import harness_of

if TYPE_CHECKING:
    import torch

    from ..checkpoints.sources import Source
    from ..runs.options import RunOptions
    from ..runs.placement import Placement
    from ..runs.runner import RunOutput
    from ..runs.session import ModelSession
    from ..runs.text import TokenizedText
    from ..sweeps.row_progress import StopRule
    from ..tasks.harness import Harness


@dataclass(frozen=True, slots=True)
class TableMeasurement:
    """Base of the measurements on text whose results are tables.

    Attributes:
        depth: number of blocks of the model.
        harness: the task whose requests are measured; None if a text is.
    """

    depth: int
    harness: Harness | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """Return the kind of result directory: an analysis."""
        return ANALYSIS

    def prepared(self, _session: ModelSession, _text: TokenizedText, _run: Run) -> Self:
        """Return the measurement itself: nothing is measured before it."""
        return self

    def rule(self, _mask: torch.Tensor | None) -> StopRule | None:
        """Return the rule that says which rows need no more text; None to measure all rows on all text."""
        return None

    def output(self, measurer: Measurer, label: str, _reporter: Reporter, rule: StopRule | None) -> RunOutput:
        """Make the output: this measurement's tables."""
        return TableOutput(measurer, label, self.tables, rule)

    def arguments(self) -> dict[str, Any]:
        """Return what the results depend on, in addition to model and text."""
        raise NotImplementedError

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer."""
        raise NotImplementedError

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make the tables from the measured sums."""
        raise NotImplementedError

    def task_costs(self, tables: SignalTables) -> TaskCosts | None:
        """Return the costs on the task; None if a text is measured, and before all requests are."""
        sums = tables.sums_by_sequence
        if self.harness is None or len(sums) < len(self.harness.text.ids):
            return None
        return task_costs(self.harness, sums)

    def context(self, tables: SignalTables) -> int:
        """Return the number of tokens of the longest sequence."""
        if self.harness is not None:
            return int(self.harness.text.ids.shape[1])
        return int(tables.sums_by_sequence.counts.max()) + 1  # the last token has no prediction

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""
        return draw_analysis(directory, run.facts)


@dataclass(frozen=True, slots=True)
class SignalMeasurement(TableMeasurement):
    """Analysis of signals on text: one signal, or all signals for the stages."""

    analysis: str

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return self.analysis

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis."""
        return {"analysis": self.analysis}

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of the analysis's signals."""
        return make_measurer(
            model, ANALYSES[self.analysis].signals, self.depth, blocks=options.blocks, read=options.read_positions
        )

    def output(self, measurer: Measurer, label: str, reporter: Reporter, _rule: StopRule | None) -> RunOutput:
        """Make the output: the analysis's tables."""
        announced: list[bool] = []

        def on_neurons(_done: int, total: int) -> None:
            if not announced:
                announced.append(True)
                reporter.log(f"Scoring the neurons of {total} blocks")

        return AnalysisOutput(self.analysis, measurer, label, on_neurons)


@dataclass(frozen=True, slots=True)
class RankMeasurement(TableMeasurement):
    """Cost of removing each layer or each branch, and on a text two scores that predict it.

    Attributes:
        spans: longest span of blocks to measure angular distances over; 0 on a task, on which the scores are not
            measured.
        lowest: race for so many parts with the lowest score; None for no race.
        of: what is ranked, one of `removable_parts.KINDS`.
        keep: layers that are not removed.
        metric: what the race compares.
    """

    spans: int
    lowest: int | None = None
    of: str = BLOCKS
    keep: frozenset[int] = frozenset()
    metric: str = "kl_nats"

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "rank"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        own = {"of": self.of} if self.of != BLOCKS else {}
        return {"analysis": self.name, "spans": self.spans, **own, **_kept(self.keep)}

    def rule(self, _mask: torch.Tensor | None) -> StopRule | None:
        """Return the race; None to measure every part on all text."""
        return None if self.lowest is None else Race(self.lowest, self.metric)

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer: it removes every part, and on a text also measures how far they turn the stream."""
        return make_rank_measurer(
            model, self.of, self.depth, self.keep, spans=self.spans, blocks=options.blocks, read=options.read_positions
        )

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make the tables of ranks, of what the parts cost and, of blocks on a text, of spans."""
        costs = {PARTS: parts_table(tables.measurer, tables.model, self.context(tables))}
        if not self.spans:
            return {"rank": task_rank_table(tables, self.task_costs(tables), self.of), **costs}
        spans = {"spans": span_table(tables)} if self.of == BLOCKS else {}
        return {"rank": rank_table(tables, self.of), **spans, **costs}


def _kept(keep: frozenset[int]) -> dict[str, Any]:
    return {"keep": sorted(keep)} if keep else {}


@dataclass(frozen=True, slots=True)
class GreedyStepMeasurement(TableMeasurement):
    """One step of greedy pruning: the remaining parts, measured after some are removed.

    Attributes:
        by: the criterion.
        removed: what is removed.
        candidates: what may be removed next.
        race: stop measuring a candidate once it is sure whether it is the lowest.
        single: blocks with one branch only.
    """

    by: str
    removed: tuple[Part, ...]
    candidates: tuple[Part, ...]
    race: bool = False
    single: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "step"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        others = [part for part in parts_of(BLOCKS, self.depth) if part not in self.removed]
        own = {} if list(self.candidates) == others else {"candidates": _words(self.candidates)}
        return {"analysis": self.name, "by": self.by, "removed": _words(self.removed), **own}

    def rule(self, _mask: torch.Tensor | None) -> StopRule | None:
        """Return the race for the part with the lowest score; None to measure every part on all text."""
        return Race(1, CRITERIA[self.by]) if self.race else None

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of each remaining part."""
        return make_step_measurer(
            model, self.by, self.removed, self.candidates, self.single, self.depth, blocks=options.blocks,
            read=options.read_positions,
        )  # fmt: skip

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each remaining part."""
        return {"step": step_table(tables, self.by, self.candidates, self.task_costs(tables))}


def _words(parts: Sequence[Part]) -> list[int | str]:
    """Return parts as `run.json` records them: a block as its number."""
    return [part.layer if part.branch is None else str(part) for part in parts]


@dataclass(frozen=True, slots=True)
class CostMeasurement(TableMeasurement):
    """Cost of each criterion, for each number of removed parts.

    Attributes:
        orders: for each criterion, what is removed: one part, two parts, and so on.
        single: blocks with one branch only.
    """

    orders: Mapping[str, Sequence[tuple[Part, ...]]]
    single: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return "costs"

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        return {
            "analysis": self.name,
            "orders": {criterion: list(map(_words, order)) for criterion, order in self.orders.items()},
        }

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of all pruned models."""
        variants = pruned_variants(self.orders, self.depth, self.single)
        return Measurer(model, variants, blocks=options.blocks, read=options.read_positions)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each criterion and number of parts."""
        whole = all(part.branch is None for order in self.orders.values() for parts in order for part in parts)
        of = BLOCKS if whole else "branches"
        return {"costs": cost_table(tables, of, self.context(tables), self.task_costs(tables))}


def run_signals(session: ModelSession, directory: Path, *, analysis: str, overwrite: bool = False) -> Run:
    """Measure an analysis's signals on the session's text, or resume it, or use the finished run in the directory."""
    return session.run(SignalMeasurement(session.model.depth, analysis), directory, overwrite=overwrite)


def run_rank(
    session: ModelSession,
    directory: Path,
    *,
    analysis: str = "rank",  # noqa: ARG001 - every analysis is given its name
    overwrite: bool = False,
    spans: int | None = None,
    lowest: int | None = None,
    of: str = BLOCKS,
) -> Run:
    """Rank the layers on the session's text, or resume it, or use the finished run in the directory.

    Args:
        session: the model and the text.
        directory: where to write.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        spans: longest span of blocks for angular distances; by default half of the model's blocks.
        lowest: race for so many layers with the lowest KL; by default every layer is measured on all text.
        of: what is ranked: blocks, or their branches.
    """
    return session.run(rank_measurement(session, spans, lowest, of), directory, overwrite=overwrite)


def rank_measurement(
    session: ModelSession,
    spans: int | None,
    lowest: int | None,
    of: str = BLOCKS,
    keep: frozenset[int] = frozenset(),
    metric: str = "kl_nats",
) -> RankMeasurement:
    """Return the measurement that ranks the layers, or branches, on the session's text, or on its task.

    Raises:
        PlanError: a number is out of range, or has no effect.
    """
    depth = session.model.depth
    if session.texts.has_tasks:
        for name, value in {"spans": spans, "lowest": lowest}.items():
            if value is not None:
                raise PlanError(f"`{name}` has no effect by a task, on which every layer is measured by dropping it")
        harness = harness_of(session)
        return RankMeasurement(depth, 0, of=check_kind(of), keep=keep, harness=harness)
    if of != BLOCKS and spans is not None:
        raise PlanError(f"`spans` are of blocks; leave them out to rank {of}")
    lowest = check_lowest(lowest, check_kind(of), len(parts_of(of, depth, keep)))
    return RankMeasurement(depth, max_span(depth, spans), lowest, of, keep, metric)


def run_neurons(session: ModelSession, directory: Path, *, analysis: str, overwrite: bool = False) -> Run:
    """Score all neurons by their weights, or use the finished run in the directory.

    On a CPU, the blocks of a model that is given by its name stay on disk and are loaded one at a time.
    """
    if session.model.source is not None:
        session.model.placement = _one_pass_placement(session.model.source, session.options, session.model.placement)
    reporter = session.reporter

    def make() -> TablesAndFacts:
        model = session.model.load()
        with reporter.count("blocks") as on_layer:
            scores = neuron_scores(model, blocks=session.options.blocks, progress=on_layer)
        reporter.log(f"{session.model.label}: {format_count(len(scores))} neurons")
        tables = {analysis: neurons_per_block(scores, session.model.label), "neuron_scores": scores}
        return tables, {"skipped": scores.attrs["skipped"]}

    return run_once(directory, session.arguments({"analysis": analysis}), reporter, make, overwrite=overwrite)


def _one_pass_placement(source: Source, options: RunOptions, placement: Placement) -> Placement:
    """Choose where to load a model of which each weight is read once.

    On a CPU, the blocks stay on disk and are loaded one at a time, unless they are quantized. Weights keep their own
    dtype unless the caller chooses one.
    """
    if options.dtype == "auto":
        placement = dataclasses.replace(placement, dtype="auto")
    if placement.device != "cpu" or placement.device_map is not None or placement.quantize is not None:
        return placement
    from transformers import AutoConfig

    from ..sweeps.weight_placement import blocks_on_disk

    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    if getattr(config, "quantization_config", None):  # of a checkpoint that is quantized already
        return placement
    return dataclasses.replace(placement, device_map=blocks_on_disk(config, options.blocks))
