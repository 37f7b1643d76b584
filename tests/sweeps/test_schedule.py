"""Schedules, run on routes instead of streams: what is computed, how often, and what is in memory."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layersurgery.errors import UnsupportedEditError
from layersurgery.plans.route import Route
from layersurgery.plans.variants import variants
from layersurgery.plans.visit import Visit
from layersurgery.sweeps.schedule import (
    LoadWeights,
    ReadLogits,
    RunBlock,
    Schedule,
    Step,
    has_groups,
    layer_major,
    schedule,
)

DEPTH = 5
_visits = st.builds(Visit, st.integers(0, DEPTH - 1), st.booleans(), st.booleans(), parallel=st.booleans())
_routes = (
    st.lists(_visits, min_size=1, max_size=8)
    .map(Route)
    .map(lambda route: route.canonical)
    .filter(lambda route: route and not route[0].parallel)
)
_some = st.lists(_routes | st.just(Route.identity(DEPTH)), min_size=1, max_size=8)


def played(plan: Schedule) -> tuple[dict[int, Route], int, int]:
    """Return a schedule's computed routes, block calls and peak of streams; check that blocks are loaded."""
    found: dict[int, Route] = {}
    calls, most, home = plan.depth, 0, set[int]()
    alive: dict[int, Route] = {}

    def go(steps: tuple[Step, ...]) -> None:
        nonlocal calls, most
        most = max(most, len(alive))
        for step in steps:
            match step.action:
                case LoadWeights(block, instead_of):
                    assert home.issuperset(instead_of)
                    assert block not in home
                    home.difference_update(instead_of)
                    home.add(block)
                    assert plan.resident_blocks is not None
                    assert len(home) <= plan.resident_blocks
                case RunBlock(visits, state, result):
                    assert not plan.during_trunk or visits[0].block in home
                    alive[result] = alive[state] + visits
                    calls += len(visits)
                    most = max(most, len(alive))
                case ReadLogits(state, numbers):
                    found.update(dict.fromkeys(numbers, alive[state]))
            for state in step.release:
                del alive[state]

    for block in range(plan.depth):
        if block in plan.saved_states:
            alive[block] = Route(range(block))
        if plan.during_trunk:
            assert isinstance(plan.during_trunk[block][0].action, LoadWeights), (
                "a block is there before the trunk goes through it"
            )
            go(plan.during_trunk[block])
    assert not any(isinstance(step.action, ReadLogits) for steps in plan.during_trunk for step in steps), (
        "KL needs the trunk's end"
    )
    alive[plan.depth] = Route(range(plan.depth))
    most = max(most, len(alive))
    if not plan.needs_final_state:
        del alive[plan.depth]
    go(plan.steps)
    assert not alive
    return found, calls, most


@given(_some, st.lists(_routes, max_size=4), st.integers(0, 3))
@example([Route([*range(DEPTH), DEPTH - 1])], [], 0)
@example([Route([*range(DEPTH), 2]), Route.identity(DEPTH)], [], 1)
@example([Route.identity(DEPTH)], [Route([0, 2, 1]), Route([0, 1])], 2)
def test_every_route_is_computed_with_every_prefix_once(routes: list[Route], walked: list[Route], at_home: int) -> None:
    """Depth first for 0, else layer by layer with so many blocks at hand; also where some are run and not read."""
    if at_home and any(map(has_groups, (*routes, *walked))):
        with pytest.raises(UnsupportedEditError, match="cannot be measured layer by layer"):
            layer_major(routes, DEPTH, at_home, walked)
        return
    plan = layer_major(routes, DEPTH, at_home, walked) if at_home else schedule(routes, DEPTH, walked)
    found, calls, most = played(plan)
    assert [found[number] for number in range(len(routes))] == routes
    trunk = Route.identity(DEPTH)
    groups = [route.groups for route in (*routes, *walked, trunk)]
    prefixes = {steps[:length] for steps in groups for length in range(1, len(steps) + 1)}
    assert calls == plan.calls == sum(len(prefix[-1]) for prefix in prefixes)
    assert plan.calls_without_sharing == DEPTH + sum(map(len, {*routes, *walked}))
    assert most == plan.states_at_peak


@pytest.mark.parametrize("depth", [2, 3, 12, 30, 32])
def test_swap_and_drop_of_every_block_cost_the_square_of_the_depth(depth: int) -> None:
    routes = [variant.route for variant in variants("swap,drop", depth)]
    plan = schedule(routes, depth)
    assert plan.calls == depth**2
    assert plan.states_at_peak <= depth + 2


def test_the_figures_for_thirty_blocks() -> None:
    plan = schedule([variant.route for variant in variants("swap,drop", 30)], 30)
    assert (plan.calls, plan.calls_without_sharing) == (900, 1770)


@pytest.mark.parametrize(("families", "at_home"), [("drop,skip-mlp,drop-span:3", 1), ("swap,drop", 2)])
@pytest.mark.parametrize("depth", [4, 12, 30])
def test_one_pass_over_the_weights(families: str, at_home: int, depth: int) -> None:
    routes = [variant.route for variant in variants(families, depth)]
    plan = layer_major(routes, depth)
    assert plan.load_order == tuple(range(depth))
    assert plan.resident_blocks == at_home
    assert plan.calls == schedule(routes, depth).calls


def test_going_back_costs_another_pass() -> None:
    back = Route(reversed(range(6)))
    assert len(layer_major([back], 6, max_resident=1).load_order) == 6 + 5
    assert len(layer_major([back], 6, max_resident=6).load_order) == 6
    pairs = [variant.route for variant in variants("swap-pairs", 8)]
    assert len(layer_major(pairs, 8, max_resident=2).load_order) <= 3 * 8


def test_a_deep_route_is_no_trouble() -> None:
    long = Route([0] * 5000)
    plan = schedule([long, Route([*long, 1])], 2)
    assert plan.calls == 2 + 4999 + 1
    assert plan.states_at_peak == 2
