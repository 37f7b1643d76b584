"""Test the logic of a search without a model: which routes are candidates, which are kept, and what they cost."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.analyses.route_search import (
    SearchSpace,
    changed_block,
    one_shot,
    pareto_front,
    plan_of,
    search_levels,
)
from layersurgery.analyses.search_cost import describe_cost, forecast
from layersurgery.plans.route import Route
from layersurgery.sweeps.schedule import schedule


def measure_by(score: Callable[[Route], float], seen: list[Sequence[Route]]) -> Callable[..., pd.DataFrame]:
    """Return a function that measures a level by a function of the route, and keeps the routes it was given."""

    def measure(_level: int, routes: Sequence[Route]) -> pd.DataFrame:
        seen.append(routes)
        frame = pd.DataFrame({"route": list(map(str, routes)), "score": [score(route) for route in routes]})
        frame["place"] = frame.score.rank(method="first").astype("Int64")
        return frame

    return measure


def by_lot(route: Route) -> float:
    return random.Random(str(route)).random()


def reachable(depth: int, added: int) -> set[tuple[int, ...]]:
    """Return the visits of every route that repeats of spans make, by trying them all."""
    by_length = {depth: {tuple(range(depth))}}
    for length in range(depth + 1, depth + added + 1):
        by_length[length] = {
            (*route[:stop], *route[start:])
            for shorter in range(depth, length)
            for route in by_length[shorter]
            for start, stop in itertools.combinations(range(shorter + 1), 2)
            if stop - start == length - shorter
        }
    return by_length[depth + added]


@pytest.mark.parametrize("max_span", [1, 2])
def test_kept_layers_are_in_every_route(max_span: int) -> None:
    space = SearchSpace.of(6, remove=3, beam=100, max_span=max_span, keep="0,-2:")
    for level, table in enumerate(search_levels(space, measure_by(by_lot, [])), 1):
        subsets = {tuple(b for b in range(6) if b not in gone) for gone in itertools.combinations((1, 2, 3), level)}
        assert {Route.parse(route).blocks for route in table.route} == subsets
    first = forecast(space)[0]
    assert (first.routes, first.exact) == (3, True)
    with pytest.raises(ls.PlanError, match="cannot remove 4 of 6 layers, and keep 3 of them; give 1 to 3"):
        SearchSpace.of(6, remove=4, keep="0,-2:")
    with pytest.raises(ls.PlanError, match="a search of repeats removes none"):
        SearchSpace.of(6, repeat=1, keep=0)


def test_a_wide_beam_tries_every_subset_once() -> None:
    for max_span in (1, 3):
        seen: list[Sequence[Route]] = []
        space = SearchSpace.of(6, remove=3, beam=100, max_span=max_span)
        tables = list(search_levels(space, measure_by(by_lot, seen)))
        for level, (routes, table) in enumerate(zip(seen, tables, strict=True), 1):
            subsets = {tuple(kept) for kept in itertools.combinations(range(6), 6 - level)}
            assert {route.blocks for route in routes} == subsets
            assert len(routes) == len(subsets) == len(table)
            assert table.kept.all()
            assert {str(Route.parse(parent)) for parent in table.parent} <= {
                "0:6",
                *(route for earlier in tables[: level - 1] for route in earlier.route),
            }


def test_a_wide_beam_tries_every_repeat_once() -> None:
    seen: list[Sequence[Route]] = []
    space = SearchSpace.of(4, repeat=3, beam=10_000)
    assert space.max_span == 3
    list(search_levels(space, measure_by(by_lot, seen)))
    for added, routes in enumerate(seen, 1):
        assert len({route.blocks for route in routes}) == len(routes)
        assert {route.blocks for route in routes} == reachable(4, added)


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_the_beam_is_what_a_plain_loop_keeps(beam: int) -> None:
    best = [tuple(range(7))]
    for _ in range(4):
        shorter = {route[:place] + route[place + 1 :] for route in best for place in range(len(route))}
        best = sorted(shorter, key=lambda blocks: by_lot(Route(blocks)))[:beam]
    table = list(search_levels(SearchSpace.of(7, depth=3, beam=beam), measure_by(by_lot, [])))[-1]
    assert [Route.parse(text).blocks for text in table[table.kept].sort_values("place").route] == best


def test_a_score_that_is_not_finite_is_not_kept() -> None:
    tables = list(
        search_levels(
            SearchSpace.of(4, remove=2, beam=4),
            measure_by(lambda route: by_lot(route) if 2 in route.blocks else math.nan, []),
        )
    )
    assert not tables[0].set_index("plan").kept["drop 2"]
    assert all(2 in Route.parse(parent).blocks for parent in tables[1].parent)
    assert set(tables[1].plan[~tables[1].kept]) == {"drop 0 2", "drop 1 2", "drop 2 3"}
    with pytest.raises(ls.MeasurementError, match="the scores of all routes of 3 blocks are NaN or infinite"):
        list(search_levels(SearchSpace.of(4, remove=1), measure_by(lambda _: math.nan, [])))
    with pytest.raises(ls.MeasurementError, match="no route of 2 blocks is left"):
        list(search_levels(SearchSpace.of(4, remove=2), measure_by(lambda _: math.nan, [])))


def test_a_longer_span_does_not_need_good_shorter_ones() -> None:
    """Two blocks that are bad to drop alone and good to drop together are found by their span, with a beam of one."""

    def score(route: Route) -> float:
        return 0.0 if route.blocks in ((1, 2, 3, 4, 5), (0, 1, 4, 5)) else 1 + by_lot(route)

    for max_span in (1, 2):
        *_, last = search_levels(SearchSpace.of(6, remove=2, beam=1, max_span=max_span), measure_by(score, []))
        assert (last[last.kept].plan.tolist() == ["drop 2 3"]) == (max_span == 2)


def test_plans_are_of_their_routes_and_short() -> None:
    for added in (1, 2, 3):
        for visits in reachable(5, added):
            route = Route(visits)
            plan = plan_of(route, 5)
            assert plan.route(5) == route
            assert len(str(plan)) <= len(f"reorder {route}")
    for dropped in itertools.chain(*(itertools.combinations(range(6), count) for count in range(1, 6))):
        route = Route(block for block in range(6) if block not in dropped)
        assert plan_of(route, 6).route(6) == route
        assert str(plan_of(route, 6)) == f"drop {Route(dropped)}"
    for text in ("repeat 2:4", "repeat 1 x3", "repeat 0:6 x4", "repeat 5", "repeat 1:4 each", "repeat 3:5 each x3"):
        assert str(plan_of(ls.Plan.parse(text).route(6), 6)) == text


@pytest.mark.parametrize(
    "asked",
    [
        {"remove": 4, "beam": 1},
        {"remove": 4, "beam": 3, "max_span": 3},
        {"depth": 2, "beam": 50},
        {"repeat": 4, "beam": 2},
        {"depth": 9, "beam": 3, "max_span": 1},
    ],
)
def test_no_search_costs_more_than_its_forecast(asked: dict[str, Any]) -> None:
    space = SearchSpace.of(7, **asked)
    costs, seen = forecast(space), list[Sequence[Route]]()
    tables = list(search_levels(space, measure_by(by_lot, seen)))
    assert [cost.exact for cost in costs] == [True] + [False] * space.levels
    for level, (cost, routes) in enumerate(zip(costs, seen, strict=False), 1):
        calls = schedule(routes, 7).calls
        assert len(routes) <= cost.routes
        assert calls <= cost.block_calls
        assert (len(routes), calls) == (cost.routes, cost.block_calls) or not cost.exact
        assert all(len(route) == cost.blocks == space.visits(level) for route in routes)
    first = tables[0].sort_values("place").route
    single = one_shot(space, [changed_block(Route.parse(route), 7) for route in first])
    best = [Route.parse(table.sort_values("place").route.iloc[0]) for table in tables]
    final = {*best, *single, *map(Route.parse, tables[-1].route[tables[-1].kept])}
    assert len(final) <= costs[-1].routes
    assert schedule(sorted(final), 7).calls <= costs[-1].block_calls
    assert describe_cost(costs).startswith(f"at most {sum(cost.routes for cost in costs):,} routes in {len(costs)} ")


def test_one_shot_changes_the_first_blocks() -> None:
    assert list(map(str, one_shot(SearchSpace.of(5, remove=3), [4, 0, 2, 1]))) == ["0:4", "1:4", "1 3"]
    assert list(map(str, one_shot(SearchSpace.of(3, repeat=4), [1, 0, 2]))) == ["0 1 1 2", "0 0 1 1 2", "0 0 1 1 2 2"]


def test_a_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    costs, scores = rng.integers(0, 6, 40), rng.integers(0, 6, 40).astype(float)
    scores[[3, 7]] = math.nan, math.inf
    meant = [
        math.isfinite(score)
        and all(
            other > cost or value > score or (other, value) == (cost, score)
            for other, value in zip(costs, scores, strict=True)
            if math.isfinite(value)
        )
        for cost, score in zip(costs, scores, strict=True)
    ]
    assert pareto_front(costs.tolist(), scores.tolist()) == meant
    assert any(meant)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "a search needs one of `depth`, `remove` and `repeat`; none is given"),
        (
            {"remove": 1, "depth": 5},
            "a search needs one of `depth`, `remove` and `repeat`; not both `depth` and `remove`",
        ),
        ({"depth": 6}, "`depth` 6 is the model's own; give fewer to remove layers, more to repeat some"),
        ({"depth": 0}, "`depth` 0 is out of range for a model of 6 blocks; give 1 to 24"),
        ({"depth": 25}, "`depth` 25 is out of range for a model of 6 blocks; give 1 to 24"),
        ({"remove": 6}, "cannot remove 6 of 6 layers; give 1 to 5"),
        ({"remove": 0}, "cannot remove 0 of 6 layers; give 1 to 5"),
        ({"repeat": 0}, "cannot repeat 0 layers of 6; give 1 to 18"),
        ({"repeat": 19}, "cannot repeat 19 layers of 6; give 1 to 18"),
        ({"remove": 2, "beam": 0}, "`beam` is the number of routes to continue from, at least 1, not 0"),
        ({"remove": 2, "max_span": 3}, "`max_span` is 1 to 2, the number of layers to change, not 3"),
        ({"remove": 1.5}, "`remove` is given as a whole number, not as 1.5"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ls.PlanError) as raised:
        SearchSpace.of(6, **asked)
    assert str(raised.value) == said
