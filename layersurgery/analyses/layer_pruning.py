"""Choosing layers to remove, one way or another, and what removing them costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import MeasurementError, PlanError
from ..metrics.aggregation import MetricSums
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_list import find_decoder_blocks
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.variants import Variant
from ..runtime.inputs import as_tokens
from ..sweeps.measurer import Measurer
from ..sweeps.observer import CHANGE
from ..sweeps.results import results_table
from .layer_ranking import CRITERIA, rank
from .signal_tables import SignalTables, collect_sums

GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Pruning:
    """Layers that were chosen for removal.

    Attributes:
        plan: the edit that removes them.
        layers: in the order in which they were chosen; those of a span in their own.
        by: the way of choosing.
        greedy: whether the others were measured anew after each removal.
        costs: what each number of layers costs, by each way of choosing: way, removed (how many), then as a table of `sweep`, with
            perplexity (exp of loss_nats); the unedited model first.
    """

    plan: Plan
    layers: tuple[int, ...]
    by: str
    greedy: bool
    costs: pd.DataFrame

    @property
    def route(self) -> Route:
        """What is left of the model."""
        return self.plan.route(int(self.costs.depth.iloc[0]))


def prune(
    model: nn.Module,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    remove: int,
    by: str = "kl",
    greedy: bool = False,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Pruning:
    """Choose layers to remove, and measure what that costs. The model is not changed: `operate_(model, found.plan)` removes them.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        tokens: token ids, (sequences, length).
        remove: how many layers.
        by: "kl" (those whose removal changes predictions least, measured one by one), "influence" (least block influence, ShortGPT), or
            "angular" (the span of neighbours over which the stream turns least, Gromov et al.); see `rank`.
        greedy: measure what is left anew after each removal, and go on from there; by "angular", a block at a time and not a span.
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences at once; by the free memory if not given.
        blocks: path of the list of blocks, where it cannot be found.
        progress: is called after each batch with what is being measured, and the number of sequences done and of all.

    Returns:
        The layers, the plan that drops them, and the costs of every way of choosing up to `remove` layers (the way "greedy" is the one asked for).

    Raises:
        PlanError: an unknown way, more layers than there are to spare, or tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: no layer is left that can be removed, predictions that are no numbers, or too little memory.

    Example:
        >>> found = prune(model, tokens, remove=6)  # doctest: +SKIP
        >>> operate_(model, found.plan)  # doctest: +SKIP
    """
    ids, mask = as_tokens(tokens, attention_mask)
    depth = len(find_decoder_blocks(model, blocks).blocks)
    check(depth, remove, by)
    known = find_anatomy(model, blocks=blocks)

    def told(words: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, of: progress(words, done, of)

    options: dict[str, Any] = {"blocks": blocks, "anatomy": known}
    found = rank(
        model, ids, spans=remove, attention_mask=mask, batch_size=batch_size, progress=told("ranking layers"), **options
    )
    orders = {way: removal_orders(found, found.attrs["spans"], remove, way) for way in CRITERIA}
    if greedy:
        steps: list[int] = []
        while len(steps) < remove:
            measurer = step_measurer(model, by, steps, depth, **options)
            sample = collect_sums(measurer, ids, mask, batch_size, told(f"choosing layer {len(steps) + 1} of {remove}"))
            steps.append(next_removal(step_table(SignalTables(measurer, sample, ""), by, steps), by, steps))
        orders[GREEDY] = [tuple(steps[:count]) for count in range(1, remove + 1)]
    measurer = Measurer(model, variants_of(orders, depth), **options)
    sample = collect_sums(measurer, ids, mask, batch_size, told("measuring what each way costs"))
    layers = orders[GREEDY if greedy else by][-1]
    return Pruning(plan_of(layers), layers, by, greedy, costs(measurer, sample.sums(), type(model).__name__))


def check(depth: int, remove: int, by: str) -> None:
    """Refuse what cannot be meant.

    Raises:
        PlanError: an unknown way, or more layers than there are to spare.
    """
    if by not in CRITERIA:
        raise PlanError(f"layers cannot be chosen by {by!r}; write {', '.join(CRITERIA)}")
    if not 1 <= remove < depth:
        raise PlanError(f"cannot remove {remove} of {depth} layers; give 1 to {depth - 1}")


def removal_orders(ranks: pd.DataFrame, spans: pd.DataFrame, remove: int, by: str) -> list[tuple[int, ...]]:
    """The layers to remove, for 1 to `remove` of them: of scores of single layers the least ones, of spans the one that turns least.

    Raises:
        MeasurementError: fewer layers can be removed.
    """
    if by == "angular":
        found = []
        for span in range(1, remove + 1):
            of_length = spans[spans.span == span].dropna(subset=["angular_distance"])
            if of_length.empty:
                raise MeasurementError(f"no span of {span} blocks can be removed")
            first = int(of_length.loc[of_length.angular_distance.idxmin(), "layer"])
            found.append(tuple(range(first, first + span)))
        return found
    ordered = ranks.dropna(subset=[CRITERIA[by]]).sort_values([CRITERIA[by], "layer"])
    if len(ordered) < remove:
        why = next(iter(ranks.attrs.get("skipped", {}).values()), "their scores are no numbers")
        raise MeasurementError(f"{remove} layers are to be removed, and only {len(ordered)} can be: {why}")
    chosen = [int(layer) for layer in ordered.layer[:remove]]
    return [tuple(chosen[:count]) for count in range(1, remove + 1)]


def plan_of(layers: Sequence[int]) -> Plan:
    """The plan that drops these layers."""
    return Plan.parse(f"drop {Route(sorted(layers))}")


def variants_of(orders: Mapping[str, Sequence[tuple[int, ...]]], depth: int) -> list[Variant]:
    """The models that each way leaves, for 1, 2, ... layers; those of one route are run once."""
    return [Variant.of(way, plan_of(layers), depth) for way, order in orders.items() for layers in order]


def costs(measurer: Measurer, sums: MetricSums, model: str) -> pd.DataFrame:
    """The table of what each way costs."""
    frame = results_table(measurer.variants, sums, model)
    frame.insert(1, "criterion", frame.pop("edit").replace("none", "unedited"))
    removed = [len(measurer.variants[0].route) - len(variant.route) for variant in measurer.variants]
    frame.insert(2, "removed", pd.array(removed, dtype="Int64"))
    frame.insert(frame.columns.get_loc("loss_nats"), "perplexity", np.exp(frame.loss_nats.clip(upper=700)))
    return frame.drop(columns=["name", "layer", "relative_depth"])


def step_measurer(model: nn.Module, by: str, removed: Sequence[int], depth: int, **options: Any) -> Measurer:
    """What measures the layers that are left, once some are removed."""
    if by != "kl":
        route = Route(block for block in range(depth) if block not in removed)
        return Measurer(model, [], observe=[CHANGE], observed_route=route, **options)
    candidates = [
        Variant.of("drop", plan_of([*removed, block]), depth) for block in range(depth) if block not in removed
    ]
    return Measurer(model, [Variant(v.edit, v.plan, v.route, None, v.name) for v in candidates], **options)


def step_table(tables: SignalTables, by: str, removed: Sequence[int]) -> pd.DataFrame:
    """The layers that are left, and the score of each."""
    if by != "kl":
        return tables.change().drop(columns=["relative_depth", "span"])
    frame = tables.drop()
    frame = frame[frame.edit == "drop"].reset_index(drop=True)
    gone = [set(range(tables.depth)) - set(Route.parse(route).blocks) - set(removed) for route in frame.route]
    frame["layer"] = pd.array([block for blocks in gone for block in blocks], dtype="Int64")
    return frame


def next_removal(step: pd.DataFrame, by: str, removed: Sequence[int]) -> int:
    """The layer to remove next.

    Raises:
        MeasurementError: none is left that can be.
    """
    scores = step.dropna(subset=[CRITERIA[by]])
    if scores.empty:
        raise MeasurementError(f"after {len(removed)} layers, no other can be removed: their scores are no numbers")
    return int(scores.loc[scores[CRITERIA[by]].idxmin(), "layer"])
