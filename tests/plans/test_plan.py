from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.plans.block_edits import Drop
from layersurgery.plans.edits import VERBS, Edit
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Route
from layersurgery.plans.variants import variants
from layersurgery.plans.visit import Visit

untyped: Any = ls


@pytest.mark.parametrize(
    ("plan", "text", "route"),
    [
        (ls.swap(12), "swap 12 13", "0:12 13 12 14:32"),
        (ls.swap(3, 7), "swap 3 7", "0:3 7 4:7 3 8:32"),
        (ls.drop(3), "drop 3", "0:3 4:32"),
        (ls.drop(20, 21, 22), "drop 20 21 22", "0:20 23:32"),
        (ls.drop(range(20, 24)), "drop 20:24", "0:20 24:32"),
        (ls.drop(range(-4, 0)), "drop -4:", "0:28"),
        (ls.drop(range(0, 32, 8)), "drop 0 8 16 24", "1:8 9:16 17:24 25:32"),
        (ls.move(5, after=9), "move 5 after 9", "0:5 6:10 5 10:32"),
        (ls.move(5, before=2), "move 5 before 2", "0 1 5 2 3 4 6:32"),
        (ls.move(range(4, 7), after=20), "move 4:7 after 20", "0:4 7:21 4:7 21:32"),
        (ls.repeat(8), "repeat 8", "0:9 8:32"),
        (ls.repeat(range(8, 16), times=2), "repeat 8:16", "0:16 8:32"),
        (ls.repeat(8, times=3), "repeat 8 x3", "0:9 8 8:32"),
        (ls.reverse(range(8, 12)), "reverse 8:12", "0:8 11 10 9 8 12:32"),
        (ls.reorder("0:12 13 12 14:32"), "reorder 0:12 13 12 14:32", "0:12 13 12 14:32"),
        (ls.reorder([3, 0, 0, range(5, 8)]), "reorder 3 0 0 5:8", "3 0 0 5 6 7"),
        (ls.skip_attention(5), "skip-attention 5", "0:5 5-attn 6:32"),
        (ls.skip_mlp(range(4, 8)), "skip-mlp 4:8", "0:4 4:8-mlp 8:32"),
        (ls.swap(12) + ls.drop(20), "swap 12 13; drop 20", "0:12 13 12 14:20 21:32"),
    ],
)
def test_plans_from_python_and_from_text(plan: Plan, text: str, route: str) -> None:
    assert str(plan) == text
    assert Plan.parse(text) == plan
    assert plan.route(32) == Route.parse(route)
    if route.count(" ") > 2:
        assert Route.parse(str(plan.route(32))) == Route.parse(route)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (ls.drop([3, 4]), "drop 3 4"),
        (ls.drop((3, range(6, 9)), 12), "drop 3 6:9 12"),
        (ls.drop(np.int64(3)), "drop 3"),
        (ls.drop(np.array([3, 7])), "drop 3 7"),
        (ls.drop(torch.tensor([3, 7])), "drop 3 7"),
        (ls.drop(pd.Series([3, 7], dtype="Int64")), "drop 3 7"),
        (ls.drop(block for block in (1, 2)), "drop 1 2"),
        (ls.skip_attention([5, -1]), "skip-attention 5 -1"),
        (ls.swap(np.int64(3), np.int32(7)), "swap 3 7"),
        (ls.swap(np.int64(3)), "swap 3 4"),
        (ls.move([4, 5, 6], after=np.int64(20)), "move 4:7 after 20"),
        (ls.repeat([-2, -1], times=np.int64(3)), "repeat -2: x3"),
        (ls.repeat([8]), "repeat 8"),
        (ls.reverse((8, 9, 10)), "reverse 8:11"),
        (ls.reorder([[3, 2], range(0, 2)]), "reorder 3 2 0:2"),  # type: ignore[list-item]
        (ls.reorder(np.array([1, 0])), "reorder 1 0"),
        (ls.reorder([ls.Visit(1, mlp=0.5), 0]), "reorder 1[mlp*0.5] 0"),
        (ls.scale(3, np.float64(0.5)), "scale 3 0.5"),
        (ls.scale(range(3, 5), 1e-7, branch="mlp"), "scale-mlp 3:5 1e-07"),
        (ls.heads_off([5, 7], np.array([3, 0, 0])), "heads-off 0 3 of 5 7"),
        (ls.neurons_off(29, range(100)), "neurons-off 0:100 of 29"),
        (Plan([Drop((3,))]), "drop 3"),  # type: ignore[arg-type]
    ],
)
def test_blocks_in_lists_and_integers_of_any_library(plan: Plan, text: str) -> None:
    assert str(plan) == text
    assert Plan.parse(text) == plan == pickle.loads(pickle.dumps(plan))


def test_every_edit_names_its_first_blocks() -> None:
    named = {
        "swap 3 1": (3,), "drop 3 1": (3,), "move 3:5 before 1": (3, 4), "repeat 3:5": (3, 4),
        "reverse -3:": (3, 4, 5), "reorder 3 1": (3,), "skip-attention 3 1": (3,), "skip-mlp 3:5": (3, 4),
        "replace 3 1": (3,), "scale 3:5 0.5": (3, 4), "scale-attention 3 2": (3,), "scale-mlp 3 1 -1": (3,),
        "heads-off 0 1 of 3 1": (3,), "neurons-off 0:9 of -3:": (3, 4, 5),
            "insert-copy 3:5 after 1": (3, 4), "take 3 1 from base": (3,), "parallel 3:5": (3, 4), "average 3 4": (3,),
    }  # fmt: skip
    assert {text.split()[0] for text in named} == set(VERBS)
    for text, blocks in named.items():
        assert Plan.parse(text).edits[0].first_blocks(6) == blocks


def test_an_edit_of_ones_own_is_read_and_measured() -> None:
    @dataclass(frozen=True, slots=True)
    class Keep(Edit):
        block: int
        examples: ClassVar = {"keep": "keep 3"}

        @classmethod
        def _parse(cls, _verb: str, text: str, /) -> Edit:
            return cls(int(text))

        @property
        def _first(self) -> int:
            return self.block

        def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
            return [visit for visit in route if visit.block == self.block % depth]

        def __str__(self) -> str:
            return f"keep {self.block}"

    try:
        (variant,) = variants("keep 3", 6)
    finally:
        VERBS.pop("keep")
    assert (variant.plan, variant.route, variant.layer) == ("keep 3", Route([3]), 3)


@pytest.mark.parametrize(
    ("route", "html"),
    [
        ("0:6", "<span>0:6</span>"),
        ("0 2 1 3:6", '<span>0</span> <b title="moved">2</b> <span>1 3:6</span>'),
        ("0:3 4:6", '<span>0:3</span> <s title="removed">3</s> <span>4 5</span>'),
        ("0:4 2:6", '<span>0:4</span> <i title="repeated">2 3</i> <span>4 5</span>'),
        ("0 2-attn 5", '<span>0</span> <s title="removed">1</s> <span>2-attn</span> <s title="removed">3 4</s> '
         "<span>5</span>"),
        ("1:5 0", '<span>1:5</span> <b title="moved">0</b>'),
        ("2:4", '<s title="removed">0 1</s> <span>2 3</span>'),
    ],
)  # fmt: skip
def test_a_route_in_a_notebook(route: str, html: str) -> None:
    assert Route.parse(route)._repr_html_() == f"<code>{html}</code>"


def test_a_plan_in_a_notebook() -> None:
    assert (ls.swap(1) + ls.drop(3))._repr_html_() == (
        "<ol><li><code>swap 1 2</code></li><li><code>drop 3</code></li></ol>"
    )
    assert Plan()._repr_html_() == "<p>no edits</p>"
    assert Route(())._repr_html_() == "<code>no blocks</code>"


def test_edits_name_blocks_and_not_positions() -> None:
    assert Plan.parse("drop 3; drop 7").route(10).blocks == (0, 1, 2, 4, 5, 6, 8, 9)
    assert Plan.parse("swap 3 4; swap 3 4").route(8).is_identity(8)
    assert Plan.parse("move 5 after 0; drop 5").route(8) == Plan.parse("drop 5").route(8)


def test_a_skip_stays_with_its_block_through_a_reorder() -> None:
    route = Plan.parse("skip-mlp 2; reorder 2 0 1").route(4)
    assert route == (Visit(2, mlp=False), Visit(0), Visit(1))


def test_drop_takes_out_every_pass_of_a_repeat() -> None:
    assert Plan.parse("repeat 2:4; drop 3").route(6).blocks == (0, 1, 2, 2, 4, 5)


def test_comments_and_lines_in_a_plan() -> None:
    assert Plan.parse("swap 1 2  # the first\n\ndrop 5\n") == ls.swap(1) + ls.drop(5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swpa 1 2", "unknown edit 'swpa'.*did you mean 'swap'"),
        ("delete 3", "unknown edit 'delete'.*did you mean 'drop'"),
        ("remove 3", "did you mean 'drop'"),
        ("Prune 3", "did you mean 'drop'"),
        ("duplicate 3", "did you mean 'repeat'"),
        ("exchange 1 2", "did you mean 'swap'"),
        ("permute 1 0", "did you mean 'reorder'"),
        ("skip-attentoin 1", "did you mean 'skip-attention'"),
        ("zzz 3", "the edits are swap, drop"),
        ("swap 3 3", "cannot be swapped with itself"),
        ("swap 3 -29", "the same block of 32"),
        (
            "swap 31",
            "block 32 is out of range: the model has 32 blocks, 0 to 31, so block 31 has no next block to swap with",
        ),
        ("swap -1", "the last and has no next"),
        ("swap 1 2 3", "expected 2 blocks, found 3"),
        ("swap 1:3 4", "expected one block, found the range 1:3"),
        ("drop", "names no block.*drop 20"),
        ("drop x", "cannot read 'x'"),
        ("drop 5-attn", "has a suffix, which only routes take"),
        ("drop 40", "block 40 is out of range"),
        ("drop 30:40", "range 30:40 is out of range.*half-open"),
        ("drop 5:5", "range 5:5 is empty"),
        ("drop 3; drop 3", "block 3 is not in the route any more"),
        ("drop 0:32", "removes all 32 blocks"),
        ("move 5 after 5", "next to itself"),
        ("move 5 after 4", "would change nothing"),
        ("move 5", "expected a block, 'after' or 'before'"),
        ("repeat 8 x1", "times must be at least 2"),
        ("repeat 8; swap 8 9", "needs one position, and block 8 has 2"),
        ("move 9 after 20; repeat 8:11", "needs adjacent blocks"),
        ("reverse 8:9", "would change nothing"),
        ("reorder 0:32", "would change nothing"),
        ("drop 3; reorder 3 4", "block 3 is not in the route any more"),
        ("skip-mlp 3; skip-mlp 3", "already skipped"),
        ("", "the plan is empty"),
        (" ; # nothing", "the plan is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ls.PlanError, match=f"(?s){message}"):
        Plan.parse(text).route(32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: untyped.move(5), "exactly one of `after` and `before`"),
        (lambda: untyped.move(5, after=1, before=2), "exactly one of `after` and `before`"),
        (lambda: untyped.drop(), "at least one block"),
        (lambda: untyped.drop("3"), "as a number, a range or a list of these, not as '3'"),
        (lambda: untyped.drop(["3"]), "not as '3'"),
        (lambda: untyped.drop([]), "drop needs at least one block"),
        (lambda: untyped.drop(3.0), "not as 3.0"),
        (lambda: untyped.drop(True), "not as True"),
        (lambda: untyped.drop(np.array([True, False])), "not as np.True_"),
        (lambda: untyped.drop(torch.tensor(True)), r"not as tensor\(True\)"),
        (lambda: untyped.drop(torch.tensor([True, False])), r"not as tensor\(True\)"),
        (lambda: untyped.drop(np.array(3.0)), r"not as array\(3.\)"),
        (lambda: Drop((1.0,)).apply(ls.Route.identity(6), 6), "a block is given as a whole number, not as 1.0"),  # type: ignore[arg-type]
        (lambda: untyped.Route([1.5]), "a block is given as a whole number, not as 1.5"),
        (lambda: untyped.drop({3: 4}), "not as {3: 4}"),
        (lambda: untyped.drop(None), "not as None"),
        (lambda: untyped.skip_mlp(Visit(3)), r"not as Visit\(block=3"),
        (lambda: untyped.swap("1", 2), "a block is given as a whole number, not as '1'"),
        (lambda: untyped.swap((1, 2)), r"a block is given as a whole number, not as \(1, 2\)"),
        (lambda: untyped.swap(1, 2.0), "not as 2.0"),
        (lambda: untyped.move(1, after=True), "not as True"),
        (lambda: untyped.repeat(1, times=2.5), "`times` is given as a whole number, not as 2.5"),
        (lambda: untyped.repeat([4, 6]), r"\[4, 6\] is not a range of adjacent blocks"),
        (lambda: untyped.repeat(range(8, 8)), r"range\(8, 8\) is empty"),
        (lambda: untyped.reverse("8:12"), "not as '8:12'"),
        (lambda: untyped.Plan("drop 3"), r"Plan\(\) takes edits, not text; use Plan.parse\('drop 3'\)"),
        (lambda: untyped.Plan(("drop 3",)), r"Plan\(\) takes edits, not 'drop 3'"),
        (
            lambda: untyped.Plan((untyped.drop(3),)),
            r"Plan\(\) takes edits, not Plan.parse\('drop 3'\); join plans with \+",
        ),
        (lambda: untyped.Plan(7), r"Plan\(\) takes edits, not 7"),
        (lambda: untyped.repeat(range(0, 8, 2)), "not a range of adjacent blocks"),
        (lambda: untyped.reorder([]), "at least one block"),
        (lambda: Visit(-1), "of at least 0"),
        (lambda: Route.parse("20:"), "depth must be known"),
        (lambda: Route.parse("-1"), "depth must be known"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ls.PlanError, match=message):
        call()


@pytest.mark.parametrize(
    ("plan", "slug"),
    [
        ("swap 12 13", "swap-12-13"),
        ("drop 20:24", "drop-20to24"),
        ("swap 12 13; drop 20", "swap-12-13_drop-20"),
        ("repeat 8 x3", "repeat-8-x3"),
        ("drop -1; skip-mlp -4:-2", "drop-end1_skip-mlp-end4toend2"),
    ],
)
def test_slugs(plan: str, slug: str) -> None:
    assert Plan.parse(plan).slug == slug


def test_long_slugs_are_cut_and_stay_different() -> None:
    plans = [ls.drop(*range(0, 60, 2)), ls.drop(*range(0, 62, 2))]
    slugs = {plan.slug for plan in plans}
    assert len(slugs) == 2
    assert all(len(slug) <= 80 for slug in slugs)


def test_integers_of_numpy_are_numbers_in_routes_and_edits() -> None:
    route = ls.Route(np.array([2, 0]))
    assert route == ls.Route((2, 0))
    assert repr(route[0]) == repr(Visit(2))
    assert Drop((np.int64(1),)).apply(ls.Route.identity(3), 3) == ls.Route((0, 2))  # type: ignore[arg-type]
