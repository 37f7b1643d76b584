"""Count the routes and the block calls of a search before anything is measured.

>>> from layersurgery.analyses.route_search import SearchSpace
>>> from layersurgery.analyses.search_cost import describe_cost, forecast
>>> describe_cost(forecast(SearchSpace.of(30, remove=6)))
'at most 584 routes in 7 measurements, with 8,586 block calls for each token'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plans.route import Route
from ..sweeps.schedule import schedule
from .route_search import FINAL, SearchSpace, level_name


@dataclass(frozen=True, slots=True)
class LevelCost:
    """Hold the cost of measuring one level.

    Attributes:
        name: the level's directory.
        blocks: number of visits of its routes.
        routes: largest number of routes that are measured.
        block_calls: largest number of block calls for each token, the unedited model's own included.
        exact: whether the numbers are exact before anything is measured, as those of the first level.
    """

    name: str
    blocks: int
    routes: int
    block_calls: int
    exact: bool = False


def forecast(space: SearchSpace) -> list[LevelCost]:
    """Count routes and block calls of each level and of the last measurement, before anything is measured.

    The first level is counted from its schedule. A later one depends on what is measured before; its bound takes
    routes of the beams that share nothing with each other, and shares what the candidates of each of them have in
    common.

    Args:
        space: the routes.
    """
    kept, costs = [1], []
    for level in range(1, space.levels + 1):
        routes = calls = 0
        for span in range(1, min(space.max_span, level) + 1):
            parents, length = kept[-span], space.visits(level - span)
            starts = range(length - span + 1)
            routes += parents * len(starts)
            after = sum(length - start - span if space.removes else length - start for start in starts)
            calls += parents * (after + (length if span < level else 0))
        if space.removes:
            routes = min(routes, math.comb(space.depth - len(space.keep), level))
        calls = space.depth + min(calls, routes * space.visits(level))
        exact = level == 1
        if exact:
            first = list(space.candidates([[Route.identity(space.depth)]]))
            routes, calls = len(first), schedule(first, space.depth).calls
        kept.append(min(space.beam, routes))
        costs.append(LevelCost(level_name(level), space.visits(level), routes, calls, exact))
    # The finalists; of each level before, the best; and of each level, what one measurement of each block would choose.
    lengths = [space.target] * kept[-1] + [space.visits(level) for level in range(1, space.levels)]
    lengths += [space.visits(level) for level in range(2, min(space.levels, space.depth) + 1)]
    costs.append(LevelCost(FINAL, space.target, len(lengths), space.depth + sum(lengths)))
    return costs


def describe_cost(costs: Sequence[LevelCost]) -> str:
    """Say how many routes a search measures and how many block calls this takes, from its forecast."""
    routes, calls = sum(cost.routes for cost in costs), sum(cost.block_calls for cost in costs)
    at_most = "" if all(cost.exact for cost in costs) else "at most "
    return f"{at_most}{routes:,} routes in {len(costs)} measurements, with {calls:,} block calls for each token"
