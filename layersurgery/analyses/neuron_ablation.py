"""Turn prediction, suppression and partition neurons off, and as many random neurons of the same blocks.

The paper argues from weights that suppression neurons sharpen the last predictions. If so, predictions without them
have a higher entropy, by more than predictions without as many other neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import MeasurementError, PlanError, UnsupportedEditError
from ..metrics.aggregation import Array, ratio
from ..metrics.intervals import student_errors
from ..metrics.reference import METRICS
from ..plans.branch_edits import UnitsOff
from ..plans.plan import Plan
from ..plans.variants import Variant
from ..registry import NEURON_KINDS
from ..sweeps.measurer import Measurer
from ..sweeps.neuron_scores import neuron_scores, pick_neurons
from .measurements import TableMeasurement

if TYPE_CHECKING:
    from pathlib import Path

    from ..runs.options import RunOptions
    from ..runs.run_directory import Run
    from ..runs.session import ModelSession
    from .signal_tables import SignalTables

ABLATION = "ablate-neurons"
_MEASURED = ("kl_nats", "entropy_change_bits", "loss_change_nats")
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Group:
    """Hold neurons of one kind, of one block or of all blocks, and random neurons to compare them with.

    Attributes:
        kind: one of `registry.NEURON_KINDS`.
        layer: the block; None for all blocks.
        neurons: number of neurons of the kind.
        of_kind: row of the model without them.
        random: rows of the models without as many random neurons of no kind, of the same blocks.
    """

    kind: str
    layer: int | None
    neurons: int
    of_kind: int
    random: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NeuronAblation(TableMeasurement):
    """Measurement of models without neurons of one kind, and without random ones.

    Attributes:
        variants: the models.
        groups: what is compared; rows count from 1, the row of the first variant.
        draws: number of random draws.
        seed: seed of the draws.
    """

    variants: tuple[Variant, ...] = ()
    groups: tuple[Group, ...] = ()
    draws: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return ABLATION

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis, and how random neurons are drawn."""
        return {"analysis": self.name, "draws": self.draws, "draw_seed": self.seed}

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of all models.

        Raises:
            UnsupportedEditError: neurons of a block cannot be turned off.
        """
        measurer = Measurer(model, self.variants, blocks=options.blocks, read=options.read_positions)
        if measurer.skipped:  # the groups name rows of all variants
            raise UnsupportedEditError(next(iter(measurer.skipped.values())))
        return measurer

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each kind and block, and one for each kind in all blocks."""
        return {ABLATION: ablation_table(self.groups, tables, self.depth)}


def run_ablation(
    session: ModelSession,
    directory: Path,
    *,
    analysis: str = ABLATION,  # noqa: ARG001 - every analysis is given its name
    overwrite: bool = False,
    draws: int = 3,
) -> Run:
    """Score the neurons, turn each kind off on the session's text, or resume it, or use the finished run.

    Args:
        session: the model and the text.
        directory: where to write.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        draws: number of random draws that each kind is compared with.
    """
    if draws < 1:
        raise PlanError(f"`draws` is a whole number of at least 1, not {draws}")
    model, seed = session.model.load(), session.options.seed
    with session.reporter.count("blocks") as on_layer:
        scores = neuron_scores(model, blocks=session.options.blocks, progress=on_layer)
    variants, groups = ablation_variants(scores, session.model.depth, draws, seed)
    measurement = NeuronAblation(session.model.depth, tuple(variants), tuple(groups), draws, seed)
    return session.run(measurement, directory, overwrite=overwrite)


def ablation_variants(scores: pd.DataFrame, depth: int, draws: int, seed: int) -> tuple[list[Variant], list[Group]]:
    """Return the models to measure, and what to compare.

    Args:
        scores: the table of `neuron_scores`.
        depth: number of blocks of the model.
        draws: number of random draws.
        seed: seed of the draws; a draw depends on the kind, the block and its number alone.

    Raises:
        MeasurementError: no block has a neuron of any kind.
        PlanError: the neurons are those of experts.
    """
    variants: list[Variant] = []
    groups: list[Group] = []
    for kind in NEURON_KINDS:
        chosen: list[dict[int, tuple[int, ...]]] = [{} for _ in range(draws + 1)]  # those of the kind, then the draws
        for layer in sorted(set(scores.layer.astype(int))):
            picked = [pick_neurons(scores, layer, kind, seed=seed, draw=draw) for draw in (None, *range(draws))]
            if all(picked):
                for neurons_of, neurons in zip(chosen, picked, strict=True):
                    neurons_of[layer] = neurons
        places: list[int | None] = [*chosen[0], *([None] if len(chosen[0]) > 1 else [])]
        for place in places:
            rows_of_group = []
            for neurons_of in chosen:
                off = neurons_of if place is None else {place: neurons_of[place]}
                variants.append(_without(kind, off, place, depth))
                rows_of_group.append(len(variants))
            count = sum(len(off) for layer, off in chosen[0].items() if place in (None, layer))
            groups.append(Group(kind, place, count, rows_of_group[0], tuple(rows_of_group[1:])))
    if not groups:
        raise MeasurementError("no neuron is a prediction, suppression or partition neuron, so none is turned off")
    return variants, groups


def most_edits(depth: int, draws: int) -> list[Plan]:
    """Return as many edits as are measured at most, which cost as much; the numbers of their neurons mean nothing.

    Args:
        depth: number of blocks of the model.
        draws: number of random draws.
    """
    places = [(block,) for block in range(depth)] + [tuple(range(depth))] * (depth > 1)
    each = range(len(NEURON_KINDS) * (draws + 1))
    return [Plan((UnitsOff("mlp", (number,), place),)) for number in each for place in places]


def _without(kind: str, neurons: Mapping[int, Sequence[int]], layer: int | None, depth: int) -> Variant:
    plan = Plan(tuple(UnitsOff("mlp", tuple(map(int, off)), (block,)) for block, off in sorted(neurons.items())))
    return Variant.from_plan(kind, plan, depth, layer if layer is not None else min(neurons))


def ablation_table(groups: Sequence[Group], tables: SignalTables, depth: int) -> pd.DataFrame:
    """Return a row for each kind and block, and one for each kind in all blocks, where `layer` is missing.

    For each metric there are its value without the neurons of the kind, the mean without random neurons, and the
    difference of both with its standard error and 95 % interval over sequences. The draws are fixed: the interval holds
    for the mean over these draws.
    """
    sums = tables.sums_by_sequence
    rows = []
    for group in groups:
        row: dict[str, Any] = {
            "model": tables.model,
            "kind": group.kind,
            "layer": group.layer,
            "relative_depth": None if group.layer is None else group.layer / max(1, depth - 1),
            "neurons": group.neurons,
            "draws": len(group.random),
        }
        for metric in _MEASURED:
            column = METRICS.index(metric)
            of_kind = sums.values[:, group.of_kind, column]
            random = sums.values[:, list(group.random), column].mean(1)
            row[metric], row[f"{metric}_sem"] = ratio(of_kind, sums.counts)
            row[f"{metric}_random"], row[f"{metric}_random_sem"] = ratio(random, sums.counts)
            row |= _difference(f"{metric}_difference", of_kind - random, sums.counts)
        rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64", "relative_depth": "float64"})


def _difference(name: str, sums: Array, counts: Array) -> dict[str, float]:
    mean, error = ratio(sums, counts)
    half = error * student_errors(len(counts), _CONFIDENCE)
    return {name: mean, f"{name}_sem": error, f"{name}_low": mean - half, f"{name}_high": mean + half}


def describe_ablation(frame: pd.DataFrame) -> str:
    """Say what the model loses without all neurons of each kind, compared with random ones.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.neuron_ablation import describe_ablation
        >>> row = {"kind": "suppression", "layer": None, "neurons": 40, "entropy_change_bits": 0.3}
        >>> row |= {"entropy_change_bits_random": 0.1, "entropy_change_bits_difference": 0.2}
        >>> row |= {"entropy_change_bits_difference_low": 0.15, "entropy_change_bits_difference_high": 0.25}
        >>> describe_ablation(pd.DataFrame([row])).partition(": ")[2]
        'entropy +0.3 bits, without random ones +0.1; the difference of +0.2 (95 %: +0.15 to +0.25) says that they sharpen predictions.'
    """  # noqa: E501 - one line of output
    sentences = []
    name = "entropy_change_bits"
    for row in frame[frame.layer.isna()].to_dict("records"):
        low, high = row[f"{name}_difference_low"], row[f"{name}_difference_high"]
        says = (
            "says that they sharpen predictions"
            if low > 0
            else "says that they make predictions less sharp"
            if high < 0
            else "may be chance"
        )
        sentences.append(
            f"Without all {row['neurons']} {row['kind']} neurons: entropy {row[name]:+.2g} bits, without random ones "
            f"{row[f'{name}_random']:+.2g}; the difference of {row[f'{name}_difference']:+.2g} (95 %: {low:+.2g} to "
            f"{high:+.2g}) {says}."
        )
    return " ".join(sentences)
