"""Choose layers to remove by a criterion, and measure the cost of removing them."""

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
        layers: the layers in the order in which they were chosen; for a span, in depth order.
        by: the criterion.
        greedy: whether the remaining layers were measured again after each removal.
        costs: the cost of removing each number of layers, by each criterion: criterion, removed (number of layers),
            then the columns of a `sweep` table, with perplexity (exp of loss_nats). The unedited model is first.
    """

    plan: Plan
    layers: tuple[int, ...]
    by: str
    greedy: bool
    costs: pd.DataFrame

    @property
    def route(self) -> Route:
        """Return the route of the pruned model."""
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
    """Choose layers to remove, and measure the cost of removing them.

    The model is not changed: `operate_(model, pruning.plan)` removes the layers.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        tokens: token ids, (sequences, length).
        remove: number of layers to remove.
        by: the criterion, see `rank`: "kl" (layers whose removal changes predictions least, measured one at a time),
            "influence" (lowest block influence, ShortGPT), or "angular" (the span of adjacent blocks with the lowest
            angular distance, Gromov et al.).
        greedy: remove one layer at a time and measure the remaining layers again after each removal. With "angular"
            this chooses single blocks, not a span.
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences per batch; chosen by free memory if not given.
        blocks: path of the list of blocks, if it cannot be found automatically.
        progress: called after each batch with the name of the current measurement, the number of sequences done and the
            total.

    Returns:
        The layers, the plan that drops them, and the costs of every criterion for 1 to `remove` layers. The criterion
        "greedy" is the greedy variant of `by`.

    Raises:
        PlanError: an unknown criterion, too many layers to remove, or tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: no remaining layer can be removed, predictions that are NaN or infinite, or too little memory.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> pruning = ls.prune(model, tokens, remove=2)
        >>> pruned = ls.operate_(model, pruning.plan)
        >>> model.config.num_hidden_layers
        28
    """
    ids, mask = as_tokens(tokens, attention_mask)
    depth = len(find_decoder_blocks(model, blocks).blocks)
    check(depth, remove, by)
    anatomy = find_anatomy(model, blocks=blocks)

    def report_progress(label: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(label, done, total)

    options: dict[str, Any] = {"blocks": blocks, "anatomy": anatomy}
    ranks = rank(
        model,
        ids,
        spans=remove,
        attention_mask=mask,
        batch_size=batch_size,
        progress=report_progress("ranking layers"),
        **options,
    )
    orders = {criterion: removal_orders(ranks, ranks.attrs["spans"], remove, criterion) for criterion in CRITERIA}
    if greedy:
        steps: list[int] = []
        while len(steps) < remove:
            measurer = step_measurer(model, by, steps, depth, **options)
            sums = collect_sums(
                measurer, ids, mask, batch_size, report_progress(f"choosing layer {len(steps) + 1} of {remove}")
            )
            steps.append(next_removal(step_table(SignalTables(measurer, sums, ""), by, steps), by, steps))
        orders[GREEDY] = [tuple(steps[:count]) for count in range(1, remove + 1)]
    measurer = Measurer(model, variants_of(orders, depth), **options)
    sums = collect_sums(measurer, ids, mask, batch_size, report_progress("measuring the cost of each criterion"))
    layers = orders[GREEDY if greedy else by][-1]
    return Pruning(plan_of(layers), layers, by, greedy, costs(measurer, sums.sums(), type(model).__name__))


def check(depth: int, remove: int, by: str) -> None:
    """Raise an error for an unknown criterion or a wrong number of layers.

    Raises:
        PlanError: an unknown criterion, or too many layers to remove.
    """
    if by not in CRITERIA:
        raise PlanError(f"unknown criterion {by!r}; choose from {', '.join(CRITERIA)}")
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
    ordered = ranks.dropna(subset=[CRITERIA[by]]).sort_values([CRITERIA[by], "layer"])
    if len(ordered) < remove:
        reason = next(iter(ranks.attrs.get("skipped", {}).values()), "their scores are NaN or infinite")
        raise MeasurementError(f"cannot remove {remove} layers; only {len(ordered)} can be removed: {reason}")
    chosen = [int(layer) for layer in ordered.layer[:remove]]
    return [tuple(chosen[:count]) for count in range(1, remove + 1)]


def plan_of(layers: Sequence[int]) -> Plan:
    """Return the plan that drops these layers."""
    return Plan.parse(f"drop {Route(sorted(layers))}")


def variants_of(orders: Mapping[str, Sequence[tuple[int, ...]]], depth: int) -> list[Variant]:
    """Return the models that each criterion leaves, for 1, 2, ... removed layers.

    Variants with the same route are run once.
    """
    return [
        Variant.from_plan(criterion, plan_of(layers), depth) for criterion, order in orders.items() for layers in order
    ]


def costs(measurer: Measurer, sums: MetricSums, model: str) -> pd.DataFrame:
    """Build the table of costs: one row for each criterion and number of removed layers."""
    frame = results_table(measurer.variants, sums, model)
    frame.insert(1, "criterion", frame.pop("edit").replace("none", "unedited"))
    removed = [len(measurer.variants[0].route) - len(variant.route) for variant in measurer.variants]
    frame.insert(2, "removed", pd.array(removed, dtype="Int64"))
    frame.insert(frame.columns.get_loc("loss_nats"), "perplexity", np.exp(frame.loss_nats.clip(upper=700)))
    return frame.drop(columns=["name", "layer", "relative_depth"])


def step_measurer(model: nn.Module, by: str, removed: Sequence[int], depth: int, **options: Any) -> Measurer:
    """Make a measurer that scores the remaining layers after some are removed, for one step of a greedy choice."""
    if by != "kl":
        route = Route(block for block in range(depth) if block not in removed)
        return Measurer(model, [], observe=[CHANGE], observed_route=route, **options)
    candidates = [
        Variant.from_plan("drop", plan_of([*removed, block]), depth) for block in range(depth) if block not in removed
    ]
    return Measurer(
        model,
        [Variant(variant.edit, variant.plan, variant.route, None, variant.name) for variant in candidates],
        **options,
    )


def step_table(tables: SignalTables, by: str, removed: Sequence[int]) -> pd.DataFrame:
    """Return the remaining layers and the score of each."""
    if by != "kl":
        return tables.change().drop(columns=["relative_depth", "span"])
    frame = tables.drop()
    frame = frame[frame.edit == "drop"].reset_index(drop=True)
    dropped = [set(range(tables.depth)) - set(Route.parse(route).blocks) - set(removed) for route in frame.route]
    frame["layer"] = pd.array([block for blocks in dropped for block in blocks], dtype="Int64")
    return frame


def next_removal(step: pd.DataFrame, by: str, removed: Sequence[int]) -> int:
    """Return the layer to remove next.

    Raises:
        MeasurementError: no remaining layer can be removed.
    """
    scores = step.dropna(subset=[CRITERIA[by]])
    if scores.empty:
        raise MeasurementError(
            f"after {len(removed)} layers, no other layer can be removed: their scores are NaN or infinite"
        )
    return int(scores.loc[scores[CRITERIA[by]].idxmin(), "layer"])
