"""Choose layers to remove by a criterion, and measure the cost of removing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..checkpoints.edit_checkpoint import EditResult
from ..errors import MeasurementError, PlanError
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.variants import Variant
from ..sweeps.measurer import Measurer
from ..sweeps.quantities import CHANGE, Observed
from ..sweeps.results import results_table
from ..tasks.task_costs import TaskCosts
from .layer_ranking import CRITERIA, MEASURED, RANKS, TASK_CRITERIA, part_column
from .linear_healing import LinearHealing
from .part_costs import PartCosts, parts_table
from .removable_parts import NOUNS, Part, leaves_a_block, plural, removal_plan
from .removal_goal import Goal
from .signal_tables import SignalTables
from .task_criterion import is_task

GREEDY = "greedy"
SECOND_ORDER = "second-order"
_SCORES = CRITERIA | TASK_CRITERIA


@dataclass(frozen=True, slots=True)
class Pruning:
    """Parts that were chosen for removal.

    Attributes:
        plan: the edit that removes them.
        parts: the parts in the order in which they were chosen; for a span of layers, in depth order. Each has a layer,
            and a branch ("attention" or "mlp"; None for a whole layer).
        by: the criterion.
        greedy: whether the remaining parts were measured again after each removal.
        costs: the cost of removing each number of parts, by each criterion: criterion, removed (number of parts), then
            the columns of a `sweep` table, with perplexity (exp of loss_nats), and what is saved. The unedited model is
            first.
        written: the pruned checkpoint, if one was written.
        healing: the linear maps that heal the model; None if it is not healed.
    """

    plan: Plan
    parts: tuple[Part, ...]
    by: str
    greedy: bool
    costs: pd.DataFrame
    written: EditResult | None = None
    healing: LinearHealing | None = None

    @property
    def measured(self) -> pd.DataFrame:
        """Return the table of costs."""
        return self.costs

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layer of each part."""
        return tuple(part.layer for part in self.parts)

    @property
    def route(self) -> Route:
        """Return the route of the pruned model."""
        return self.plan.route(int(self.costs.depth.iloc[0]))


def greedy_removals(
    by: str,
    measure_step: Callable[[tuple[Part, ...]], pd.DataFrame],
    is_reached: Callable[[tuple[Part, ...]], bool],
    noun: str = "layer",
) -> Iterator[tuple[Part, float]]:
    """Choose parts one at a time; after each removal, the remaining parts are measured again.

    Args:
        by: the criterion.
        measure_step: measures the remaining parts after some are removed, in memory or into a directory of results;
            returns the table of `step_table`.
        is_reached: tells whether the removal of some parts is enough.
        noun: what one part is called.

    Yields:
        Each removed part, and its score by the criterion.

    Raises:
        MeasurementError: no remaining part can be removed.
    """
    removed: tuple[Part, ...] = ()
    while not is_reached(removed):
        table = measure_step(removed)
        if "race" in table:
            table = table[table.race == ("lowest" if (table.race == "lowest").any() else "open")]
        scores = table["cost" if is_task(by) else CRITERIA[by]].astype(float).dropna()
        if scores.empty:
            raise MeasurementError(
                f"after {len(removed)} {plural(noun, len(removed))}, no other {noun} can be removed: their scores are "
                "NaN or infinite"
            )
        row = table.loc[scores.index, RANKS["task"]].astype(float).idxmin() if is_task(by) else scores.idxmin()
        part = part_column(table.loc[[row]])[0]
        yield part, float(scores[row])
        removed = (*removed, part)


def check_criterion(by: str, goal: Goal, *, greedy: bool) -> None:
    """Refuse a criterion that is unknown, or that cannot be measured for what is removed.

    Raises:
        PlanError: it is unknown, or cannot.
    """
    if by == SECOND_ORDER:
        raise PlanError(
            "second-order is not a criterion: it was tried and not kept, since this estimate of the KL did not choose "
            "better layers than block influence (python -m benchmarks second-order); choose from "
            f"{', '.join(CRITERIA)} or task:NAME"
        )
    if by not in CRITERIA and not is_task(by):
        raise PlanError(f"unknown criterion {by!r}; choose from {', '.join(CRITERIA)} or task:NAME")
    if greedy and not goal.of_blocks and by in CRITERIA and by not in MEASURED:
        raise PlanError(
            f"a greedy choice of branches by {by} is not supported: it would have to observe models with skipped "
            f"branches; choose by {', '.join(MEASURED)} or task:NAME, or leave `greedy` out"
        )


def removal_orders(
    ranks: Sequence[pd.DataFrame], spans: pd.DataFrame, goal: Goal, costs: PartCosts, by: str
) -> list[tuple[Part, ...]]:
    """Return the parts to remove, for each number of parts from 1 to as many as the goal needs.

    A criterion on single parts takes those with the lowest scores; "angular" takes the span of blocks with the lowest
    distance.

    Args:
        ranks: for each kind of parts of the goal, its table.
        spans: the table of spans of blocks; empty for branches.
        goal: how much is removed.
        costs: what parts cost.
        by: the criterion.

    Raises:
        MeasurementError: fewer parts can be removed.
    """
    if by == "angular" and goal.of_blocks:
        return _span_orders(spans, goal, costs)
    ordered, reasons = [], []
    for kind, frame in zip(goal.kinds, ranks, strict=True):
        usable = frame.dropna(subset=[_SCORES[by], RANKS[by]]).sort_values(RANKS[by])
        usable = usable[~usable.layer.isin(goal.keep)]
        wanted = goal.counts.get(kind, len(usable))
        reasons += frame.attrs.get("skipped", {}).values()
        if len(usable) < wanted:
            reason = next(iter(reasons), "their scores are NaN or infinite")
            what = plural(NOUNS[kind], wanted)
            raise MeasurementError(f"cannot remove {wanted} {what}; only {len(usable)} can be removed: {reason}")
        ordered.append(usable.head(wanted))
    # Scores of a race are of different text, so between two kinds their order is approximate; the choice is not.
    merged = _merge([list(zip(part_column(rows), rows[_SCORES[by]], strict=True)) for rows in ordered])
    chosen: list[tuple[Part, ...]] = []
    for count in range(1, len(merged) + 1):
        if not leaves_a_block(merged[:count], costs.depth, costs.single):
            break
        chosen.append(tuple(merged[:count]))
        if goal.is_reached(chosen[-1], costs):
            return chosen
    raise MeasurementError(_unreached(goal, costs, chosen[-1] if chosen else (), reasons))


def _unreached(goal: Goal, costs: PartCosts, removed: Sequence[Part], reasons: Sequence[str] = ()) -> str:
    """Say that a budget is not reached when everything is removed that can be."""
    assert goal.budget is not None
    percent = 100 * costs.share(removed, goal.budget.name)
    saved = "is not known for this model" if math.isnan(percent) else f"is {percent:.3g} %"
    why = f" (others cannot: {reasons[0]})" if reasons else ""
    return (
        f"the budget {goal.budget} cannot be reached: what the removal of all {len(removed)} "
        f"{plural(goal.noun, len(removed))} that can be removed{why} saves {saved}"
    )


def _merge(lists: Sequence[Sequence[tuple[Part, float]]]) -> list[Part]:
    """Merge ordered lists by the scores of their first entries."""
    left = [list(entries) for entries in lists]
    merged = []
    while any(left):
        lowest = min((entries for entries in left if entries), key=lambda entries: entries[0][1])
        merged.append(lowest.pop(0)[0])
    return merged


def _span_orders(spans: pd.DataFrame, goal: Goal, costs: PartCosts) -> list[tuple[Part, ...]]:
    chosen: list[tuple[Part, ...]] = []
    longest = int(spans.span.max())
    for span in range(1, (goal.count or longest) + 1):
        candidates = spans[spans.span == span].dropna(subset=["angular_distance"])
        touches = [any(layer <= block < layer + span for block in goal.keep) for layer in candidates.layer]
        candidates = candidates[~np.array(touches, bool)]
        if candidates.empty:
            raise MeasurementError(f"no span of {span} blocks can be removed")
        first = int(candidates.loc[candidates.angular_distance.idxmin(), "layer"])
        chosen.append(tuple(map(Part, range(first, first + span))))
        if goal.is_reached(chosen[-1], costs):
            return chosen
    raise MeasurementError(_unreached(goal, costs, chosen[-1]))


def prefixes(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Return the first part, the first two parts, and so on, up to all of them."""
    return [tuple(parts[:count]) for count in range(1, len(parts) + 1)]


def pruned_variants(
    orders: Mapping[str, Sequence[tuple[Part, ...]]], depth: int, single: Collection[int]
) -> list[Variant]:
    """Return the models that each criterion leaves, for 1, 2, ... removed parts; the name of each is their number.

    Variants with the same route are run once.
    """
    return [
        replace(Variant.from_plan(criterion, removal_plan(parts, single), depth), name=str(len(parts)))
        for criterion, order in orders.items()
        for parts in order
    ]


def cost_table(tables: SignalTables, of: str, context: int, costs: TaskCosts | None = None) -> pd.DataFrame:
    """Build the table of costs: one row for each criterion and number of removed parts.

    Args:
        tables: the measured sums.
        of: what was removed: "blocks" or "branches".
        context: number of tokens of a text, for what is saved.
        costs: the costs on a task, if one is measured.
    """
    measurer = tables.measurer
    frame = results_table(measurer.variants, tables.sums_by_sequence, tables.model)
    if costs is not None:
        frame = frame.join(costs.costs).join(costs.columns)
    frame.insert(1, "criterion", frame.pop("edit").replace("none", "unedited"))
    removed = [int(variant.name) if variant.edit != "none" else 0 for variant in measurer.variants]
    frame.insert(2, "removed", pd.array(removed, dtype="Int64"))
    frame.insert(3, "of", of)
    frame.insert(frame.columns.get_loc("loss_nats"), "perplexity", np.exp(frame.loss_nats.clip(upper=700)))
    saved = PartCosts(parts_table(measurer, tables.model, context)).columns(
        variant.route for variant in measurer.variants
    )
    return frame.drop(columns=["name", "layer", "relative_depth"]).join(saved.assign(context=context))


def make_step_measurer(
    model: nn.Module,
    by: str,
    removed: Sequence[Part],
    candidates: Sequence[Part],
    single: Collection[int],
    depth: int,
    **options: Any,
) -> Measurer:
    """Make a measurer that scores the candidates after some parts are removed, for one step of a greedy choice."""
    if by in CRITERIA and by not in MEASURED:
        route = Route(block for block in range(depth) if Part(block) not in removed)
        return Measurer(model, [], observe=Observed([CHANGE], route=route), **options)
    variants = [
        replace(Variant.from_plan(part.edit, removal_plan([*removed, part], single), depth, part.layer), name=str(part))
        for part in candidates
        if leaves_a_block([*removed, part], depth, single)
    ]
    return Measurer(model, variants, **options)


def step_table(
    tables: SignalTables, by: str, candidates: Sequence[Part], costs: TaskCosts | None = None
) -> pd.DataFrame:
    """Return the remaining candidates and the score of each."""
    if by in CRITERIA and by not in MEASURED:
        frame = tables.change().drop(columns=["relative_depth", "span"])
        return frame[frame.layer.isin([part.layer for part in candidates])].reset_index(drop=True)
    frame = tables.edited({part.edit for part in candidates})
    if costs is not None:
        ranks = pd.Series(costs.places(), dtype="Int64", name=RANKS["task"])
        frame = frame.join(costs.costs).join(ranks).join(costs.columns)
    frame = frame[frame.edit != "none"].reset_index(drop=True)
    parts = [Part.parse(word) for word in frame.name]
    frame["layer"] = pd.array([part.layer for part in parts], dtype="Int64")
    if any(part.branch for part in parts):
        frame.insert(frame.columns.get_loc("layer") + 1, "part", [part.name for part in parts])
    return frame
