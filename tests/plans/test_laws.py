"""What must hold for every plan and every depth, whatever the numbers."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import layersurgery as ls
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Route
from layersurgery.plans.visit import Visit

DEPTH = 12
blocks = st.integers(0, DEPTH - 1)
spans = (
    st.tuples(blocks, st.integers(2, 5))
    .map(lambda s: range(s[0], min(s[0] + s[1], DEPTH)))
    .filter(lambda r: len(r) > 1)
)
factors = st.sampled_from([True, False, 0.5, -2.0])
visits = st.one_of(
    st.builds(Visit, blocks, factors, factors, source=st.sampled_from(["", "base"]), start=st.integers(0, 2)),
    st.builds(Visit, blocks, factors, mean=st.sampled_from([(), ("mlp",), ("attention", "mlp")]), divisor=st.just(3)),
    st.builds(Visit, blocks, heads_off=st.tuples(st.integers(0, 3)), zeroed=st.booleans()),
)


@st.composite
def edits(draw: st.DrawFn) -> Plan:
    """One edit that fits a model of DEPTH blocks."""
    kind = draw(st.sampled_from(["swap", "drop", "move", "repeat", "replace", "reverse", "skip_attention", "skip_mlp"]))
    a, b = draw(st.lists(blocks, min_size=2, max_size=2, unique=True))
    span = draw(spans)
    if kind == "swap":
        return ls.swap(a, b)
    if kind == "drop":
        return ls.drop(a)
    if kind == "move":
        return ls.move(a, after=b) if draw(st.booleans()) else ls.move(a, before=b)
    if kind == "repeat":
        return ls.repeat(span, times=draw(st.integers(2, 3)), each=draw(st.booleans()))
    if kind == "replace":
        return ls.replace(a, b)
    if kind == "reverse":
        return ls.reverse(span)
    return ls.skip_attention(a) if kind == "skip_attention" else ls.skip_mlp(a)


def named(plan: Plan) -> set[int]:
    """The blocks that the plan's text names."""
    words = str(plan).replace(" x3", "").replace(";", " ").split()
    found: set[int] = set()
    for word in words:
        if ":" in word:
            start, stop = map(int, word.split(":"))
            found |= set(range(start, stop))
        elif word.isdigit():
            found.add(int(word))
    return found


def route_or_none(plan: Plan) -> Route | None:
    try:
        return plan.route(DEPTH)
    except ls.PlanError:
        return None


@given(st.lists(visits, min_size=1, max_size=20).map(Route))
def test_a_route_survives_its_text(route: Route) -> None:
    assert Route.parse(str(route)) == route
    assert pickle.loads(pickle.dumps(route)) == route


@given(st.lists(edits(), min_size=1, max_size=4))
def test_a_plan_survives_its_text(parts: list[Plan]) -> None:
    plan = sum(parts[1:], parts[0])
    assert Plan.parse(str(plan)) == plan
    assert eval(repr(plan), {"Plan": Plan}) == plan


@given(edits(), edits())
def test_edits_of_different_blocks_commute(first: Plan, second: Plan) -> None:
    if named(first) & named(second):
        return
    one, other = route_or_none(first + second), route_or_none(second + first)
    if one is not None and other is not None:
        assert one == other


@given(edits())
def test_an_edit_that_undoes_itself(edit: Plan) -> None:
    if str(edit).startswith(("swap", "reverse")):
        assert (edit + edit).route(DEPTH).is_identity(DEPTH)


@given(edits())
def test_an_edit_changes_the_route_or_is_refused(edit: Plan) -> None:
    route = route_or_none(edit)
    assert route is None or not route.is_identity(DEPTH)


@given(st.lists(edits(), min_size=1, max_size=3))
def test_blocks_change_only_in_number_that_was_asked(parts: list[Plan]) -> None:
    plan = sum(parts[1:], parts[0])
    route = route_or_none(plan)
    if route is None:
        return
    assert set(route.blocks) <= set(range(DEPTH))
    untouched = set(range(DEPTH)) - named(plan)
    assert all(route.blocks.count(block) == 1 for block in untouched)
    assert [block for block in route.blocks if block in untouched] == sorted(untouched)


@given(blocks)
def test_skipping_both_branches_is_dropping(block: int) -> None:
    both = ls.skip_attention(block) + ls.skip_mlp(block)
    assert both.route(DEPTH) == ls.drop(block).route(DEPTH)


@given(st.lists(visits.filter(lambda v: not v.adds_nothing), min_size=1, max_size=20).map(Route))
def test_any_route_can_be_written_as_a_reorder(route: Route) -> None:
    if route.is_identity(DEPTH):
        with pytest.raises(ls.PlanError, match="would change nothing"):
            ls.reorder(route).route(DEPTH)
    else:
        assert ls.reorder(str(route)).route(DEPTH) == ls.reorder(route).route(DEPTH) == route


@given(blocks, blocks)
def test_negative_numbers_count_from_the_end(a: int, b: int) -> None:
    if a != b:
        assert ls.swap(a - DEPTH, b - DEPTH).route(DEPTH) == ls.swap(a, b).route(DEPTH)


@given(st.text(max_size=30))
def test_text_is_a_plan_or_an_error_of_ours(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except ls.PlanError:
        return
    assert Plan.parse(str(plan)) == plan


@given(st.text(alphabet="0123456789:- ,atnmlp", max_size=20))
def test_text_is_a_route_or_an_error_of_ours(text: str) -> None:
    try:
        route = Route.parse(text, DEPTH)
    except ls.PlanError:
        return
    assert Route.parse(str(route)) == route
