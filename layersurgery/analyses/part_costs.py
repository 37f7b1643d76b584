"""Make tables of what the parts of a model cost, and of what their removal saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..metrics.aggregation import Array
from ..models.block_costs import PartCost
from ..plans.route import Route
from ..sweeps.measurer import Measurer
from .removable_parts import BUDGETS, Part, removal_plan, removed_parts

COSTS = tuple(BUDGETS.values())
PARTS = "parts"
"""Name of the table of what parts cost."""


def parts_table(measurer: Measurer, model: str, context: int) -> pd.DataFrame:
    """Build the table of what each block and each of its branches cost.

    Args:
        measurer: has the model.
        model: its name.
        context: number of tokens of a text: the multiplications of attention depend on it, and the cache of a sliding
            window.

    Returns:
        A row for each block and each branch: model, layer, part, parameters, multiplications (for each token),
        cache_bytes (for each token) and context.
    """
    rows: list[dict[str, Any]] = []
    for layer, costs in enumerate(measurer.block_costs):
        for part, cost in (("block", costs.block), *costs.branches.items()):
            rows.append({"model": model, "layer": layer, "part": part, **_row(cost, context), "context": context})
    return pd.DataFrame(rows).astype({"layer": "Int64", "parameters": "Int64", "context": "Int64"})


def _row(cost: PartCost, context: int) -> dict[str, float]:
    return {
        "parameters": cost.parameters,
        "multiplications": cost.multiplications(context),
        "cache_bytes": cost.bytes_per_token(context),
    }


class PartCosts:
    """Costs of the parts of a model, and what routes save.

    Args:
        frame: the table of `parts_table`.

    Attributes:
        single: the blocks with one branch only: without it, they add nothing and are dropped.
        total: what all blocks cost, in the order of `COSTS`.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        values = frame[list(COSTS)].to_numpy(float)
        parts = [Part.of_row(layer, part) for layer, part in zip(frame.layer, frame.part, strict=True)]
        self._costs: dict[Part, Array] = dict(zip(parts, values, strict=True))
        blocks = [part for part in self._costs if part.branch is None]
        self.depth = len(blocks)
        branches = [part.layer for part in self._costs if part.branch is not None]
        self.single = frozenset(layer for layer in branches if branches.count(layer) == 1)
        self.total: Array = np.sum([self._costs[part] for part in blocks], axis=0)

    def saved(self, route: Route, *, skipping: bool) -> Array:
        """Return what a route saves, in the order of `COSTS`.

        Args:
            route: the route of a removal.
            skipping: count the skipped branches, too. In a plain checkpoint their output weights are zeros, which every
                program multiplies as others.
        """
        parts = removed_parts(route, self.depth)
        zero = np.zeros(len(COSTS))
        return sum((self._costs[part] for part in parts if skipping or part.branch is None), start=zero)

    def share(self, removed: Iterable[Part], budget: str) -> float:
        """Return which share of all blocks' cost a removal saves, if the program skips the skipped branches."""
        parts = list(removed)
        if not parts:
            return 0.0
        column = COSTS.index(BUDGETS[budget])
        route = removal_plan(parts, self.single).route(self.depth)
        total = float(self.total[column])
        return float(self.saved(route, skipping=True)[column]) / total if total else 0.0

    def columns(self, routes: Iterable[Route]) -> pd.DataFrame:
        """Return the columns of a table of routes: what each saves as a plain checkpoint and if branches are skipped.

        Returns:
            A row for each route: parameters_saved, multiplications_saved and cache_bytes_saved, the same with the end
            `_saved_if_skipped`, and what all blocks of the unedited model cost (`parameters_of_blocks` and so on).
        """
        rows = []
        for route in routes:
            row: dict[str, float] = {}
            for end, skipping in (("saved", False), ("saved_if_skipped", True)):
                values = self.saved(route, skipping=skipping)
                row |= {f"{name}_{end}": value for name, value in zip(COSTS, values, strict=True)}
            rows.append(row | {f"{name}_of_blocks": value for name, value in zip(COSTS, self.total, strict=True)})
        return pd.DataFrame(rows)
