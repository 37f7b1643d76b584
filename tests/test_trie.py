"""Schedules, played with words for streams: what is computed, how often, and what is alive meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layersurgery.families import variants
from layersurgery.route import Route, Visit
from layersurgery.trie import Read, Run, Schedule, schedule

DEPTH = 5
_visits = st.builds(Visit, st.integers(0, DEPTH - 1), st.booleans(), st.booleans())
_routes = st.lists(_visits, min_size=1, max_size=8).map(Route).map(lambda route: route.canonical).filter(len)
_some = st.lists(_routes | st.just(Route.identity(DEPTH)), min_size=1, max_size=8)


def played(plan: Schedule) -> tuple[dict[int, Route], int, int]:
    """Routes as the schedule computes them, block calls, and the most streams alive."""
    alive = {state: Route(range(state)) for state in plan.kept}
    found: dict[int, Route] = {}
    calls, most = plan.depth, len(alive)
    if not plan.ends_unedited:
        del alive[plan.depth]
    for step in plan.steps:
        match step.do:
            case Run(visit, state, result):
                alive[result] = alive[state] + (visit,)
                calls += 1
                most = max(most, len(alive))
            case Read(state, numbers):
                found |= dict.fromkeys(numbers, alive[state])
        for state in step.free:
            del alive[state]
    assert not alive
    return found, calls, most


@given(_some)
def test_every_route_is_computed_with_every_prefix_once(routes: list[Route]) -> None:
    plan = schedule(routes, DEPTH)
    found, calls, most = played(plan)
    assert [found[number] for number in range(len(routes))] == routes
    trunk = Route.identity(DEPTH)
    prefixes = {route[:length] for route in routes for length in range(1, len(route) + 1)}
    trunk_prefixes = {trunk[:length] for length in range(1, DEPTH + 1)}
    assert calls == plan.calls == len(prefixes | trunk_prefixes)
    assert plan.calls_apart == DEPTH + sum(map(len, set(routes)))
    assert most == plan.states_at_peak


@pytest.mark.parametrize("depth", [2, 3, 12, 30, 32])
def test_swap_and_drop_of_every_block_cost_the_square_of_the_depth(depth: int) -> None:
    routes = [variant.route for variant in variants("swap,drop", depth)]
    plan = schedule(routes, depth)
    assert plan.calls == depth**2
    assert plan.states_at_peak <= depth + 2


def test_the_figures_for_thirty_blocks() -> None:
    plan = schedule([variant.route for variant in variants("swap,drop", 30)], 30)
    assert (plan.calls, plan.calls_apart) == (900, 1770)


def test_a_deep_route_is_no_trouble() -> None:
    long = Route([0] * 5000)
    plan = schedule([long, Route([*long, 1])], 2)
    assert plan.calls == 2 + 4999 + 1
    assert plan.states_at_peak == 2
