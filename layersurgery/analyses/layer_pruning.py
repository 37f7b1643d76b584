"""Choose layers to remove by a criterion, and measure the cost of removing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..checkpoints.edit_checkpoint import EditResult
from ..errors import MeasurementError, PlanError
from ..metrics.aggregation import SequenceSums
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.variants import Variant
from ..sweeps.measurer import Measurer
from ..sweeps.quantities import CHANGE, Observed
from ..sweeps.results import results_table
from ..tasks.task_costs import TaskCosts
from .layer_ranking import CRITERIA, RANKS, TASK_CRITERIA
from .signal_tables import SignalTables
from .task_criterion import is_task

GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Pruning:
    """Layers that were chosen for removal.

    Attributes:
        plan: the edit that removes them.
        layers: the layers in the order in which they were chosen; for a span, in depth order.
        by: the criterion.
        greedy: whether the remaining layers were measured again after each removal.
        costs: the cost of removing each number of layers, by each criterion: criterion, removed (number of layers),
            then the columns of a `sweep` table, with perplexity (exp of loss_nats). The unedited model is first.
        written: the pruned checkpoint, if one was written.
    """

    plan: Plan
    layers: tuple[int, ...]
    by: str
    greedy: bool
    costs: pd.DataFrame
    written: EditResult | None = None

    @property
    def route(self) -> Route:
        """Return the route of the pruned model."""
        return self.plan.route(int(self.costs.depth.iloc[0]))


def greedy_removals(
    remove: int, by: str, measure_step: Callable[[tuple[int, ...]], pd.DataFrame]
) -> Iterator[tuple[int, float]]:
    """Choose layers one at a time; after each removal, the remaining layers are measured again.

    Args:
        remove: number of layers to remove.
        by: the criterion.
        measure_step: measures the remaining layers after some are removed, in memory or into a directory of results;
            returns the table of `step_table`.

    Yields:
        Each removed layer, and its score by the criterion.

    Raises:
        MeasurementError: no remaining layer can be removed.
    """
    removed: tuple[int, ...] = ()
    while len(removed) < remove:
        table = measure_step(removed).set_index("layer")
        if "race" in table:
            table = table[table.race == ("lowest" if (table.race == "lowest").any() else "open")]
        scores = table["cost" if is_task(by) else CRITERIA[by]].dropna()
        if scores.empty:
            raise MeasurementError(
                f"after {len(removed)} layers, no other layer can be removed: their scores are NaN or infinite"
            )
        layer = int(table.loc[scores.index, RANKS["task"]].idxmin() if is_task(by) else scores.idxmin())
        yield layer, float(scores[layer])
        removed = (*removed, layer)


def check_removal(depth: int, remove: int, by: str) -> None:
    """Raise an error for an unknown criterion or a wrong number of layers.

    Raises:
        PlanError: an unknown criterion, or too many layers to remove.
    """
    if by not in CRITERIA and not is_task(by):
        raise PlanError(f"unknown criterion {by!r}; choose from {', '.join(CRITERIA)} or task:NAME")
    if not 1 <= remove < depth:
        raise PlanError(f"cannot remove {remove} of {depth} layers; give 1 to {depth - 1}")


def removal_orders(ranks: pd.DataFrame, spans: pd.DataFrame, remove: int, by: str) -> list[tuple[int, ...]]:
    """Return the layers to remove, for each number of layers from 1 to `remove`.

    A criterion on single layers takes those with the lowest scores; "angular" takes the span with the lowest distance.

    Raises:
        MeasurementError: fewer layers can be removed.
    """
    if by == "angular":
        chosen_spans = []
        for span in range(1, remove + 1):
            candidates = spans[spans.span == span].dropna(subset=["angular_distance"])
            if candidates.empty:
                raise MeasurementError(f"no span of {span} blocks can be removed")
            first = int(candidates.loc[candidates.angular_distance.idxmin(), "layer"])
            chosen_spans.append(tuple(range(first, first + span)))
        return chosen_spans
    ordered = ranks.dropna(subset=[(CRITERIA | TASK_CRITERIA)[by]]).sort_values(RANKS[by])
    if len(ordered) < remove:
        reason = next(iter(ranks.attrs.get("skipped", {}).values()), "their scores are NaN or infinite")
        raise MeasurementError(f"cannot remove {remove} layers; only {len(ordered)} can be removed: {reason}")
    return prefixes([int(layer) for layer in ordered.layer[:remove]])


def prefixes(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the first layer, the first two layers, and so on, up to all of them."""
    return [tuple(layers[:count]) for count in range(1, len(layers) + 1)]


def removal_plan(layers: Sequence[int]) -> Plan:
    """Return the plan that drops these layers."""
    return Plan.parse(f"drop {Route(sorted(layers))}")


def pruned_variants(orders: Mapping[str, Sequence[tuple[int, ...]]], depth: int) -> list[Variant]:
    """Return the models that each criterion leaves, for 1, 2, ... removed layers.

    Variants with the same route are run once.
    """
    return [
        Variant.from_plan(criterion, removal_plan(layers), depth)
        for criterion, order in orders.items()
        for layers in order
    ]


def cost_table(measurer: Measurer, sums: SequenceSums, model: str, costs: TaskCosts | None = None) -> pd.DataFrame:
    """Build the table of costs: one row for each criterion and number of removed layers."""
    frame = results_table(measurer.variants, sums, model)
    if costs is not None:
        frame = frame.join(costs.costs).join(costs.columns)
    frame.insert(1, "criterion", frame.pop("edit").replace("none", "unedited"))
    removed = [len(measurer.variants[0].route) - len(variant.route) for variant in measurer.variants]
    frame.insert(2, "removed", pd.array(removed, dtype="Int64"))
    frame.insert(frame.columns.get_loc("loss_nats"), "perplexity", np.exp(frame.loss_nats.clip(upper=700)))
    return frame.drop(columns=["name", "layer", "relative_depth"])


def make_step_measurer(model: nn.Module, by: str, removed: Sequence[int], depth: int, **options: Any) -> Measurer:
    """Make a measurer that scores the remaining layers after some are removed, for one step of a greedy choice."""
    if by in CRITERIA and by != "kl":
        route = Route(block for block in range(depth) if block not in removed)
        return Measurer(model, [], observe=Observed([CHANGE], route=route), **options)
    candidates = [
        Variant.from_plan("drop", removal_plan([*removed, block]), depth)
        for block in range(depth)
        if block not in removed
    ]
    return Measurer(
        model,
        [Variant(variant.edit, variant.plan, variant.route, None, variant.name) for variant in candidates],
        **options,
    )


def step_table(tables: SignalTables, by: str, removed: Sequence[int], costs: TaskCosts | None = None) -> pd.DataFrame:
    """Return the remaining layers and the score of each."""
    if by in CRITERIA and by != "kl":
        return tables.change().drop(columns=["relative_depth", "span"])
    frame = tables.drop()
    if costs is not None:
        ranks = pd.Series(costs.places(), dtype="Int64", name=RANKS["task"])
        frame = frame.join(costs.costs).join(ranks).join(costs.columns)
    frame = frame[frame.edit == "drop"].reset_index(drop=True)
    dropped = [set(range(tables.depth)) - set(Route.parse(route).blocks) - set(removed) for route in frame.route]
    frame["layer"] = pd.array([block for blocks in dropped for block in blocks], dtype="Int64")
    return frame
