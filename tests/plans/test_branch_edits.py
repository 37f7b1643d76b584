"""Edits of what attention and MLP add: their text, their routes, and what they refuse."""

from __future__ import annotations

import pytest

import layersurgery as ls
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Route
from layersurgery.plans.variants import family
from layersurgery.plans.visit import Visit


@pytest.mark.parametrize(
    ("plan", "route"),
    [
        ("scale 2 0.5", "0 1 2[attn*0.5][mlp*0.5] 3:6"),
        ("scale-mlp 1:3 -1.5", "0 1[mlp*-1.5] 2[mlp*-1.5] 3:6"),
        ("scale-attention 2 0.5; scale 2 4", "0 1 2[attn*2][mlp*4] 3:6"),
        ("scale-attention 2 0.5; scale-attention 2 2", "0:6"),
        ("scale-mlp 2 0", "0 1 2-mlp 3:6"),
        ("scale 2 0", "0 1 3:6"),
        ("heads-off 5 0:2 of 2; heads-off 2 of 2", "0 1 2[heads-off 0:3+5] 3:6"),
        ("neurons-off 0:100 203 of 2; skip-attention 2", "0 1 2-attn[neurons-off 0:100+203] 3:6"),
        ("heads-off 1 of 2; skip-attention 2", "0 1 2-attn 3:6"),
        ("scale-mlp 2 0.5; repeat 2; swap 0 1", "1 0 2[mlp*0.5] 2[mlp*0.5] 3:6"),
        ("scale-mlp 2 0.5; reorder 2 2[mlp*0.5]", "2[mlp*0.5] 2[mlp*0.25]"),
        ("reorder 0 1[ attention * .5 ][heads-off 0, 2]", "0 1[attn*0.5][heads-off 0+2]"),
        ("take 2 from base; scale 2 0.5", "0 1 2@base[attn*0.5][mlp*0.5] 3:6"),
        ("take 1:3 from base; skip-mlp 2", "0 1@base 2@base-mlp 3:6"),
        ("insert-copy 2 after 2", "0:3 2[zeroed] 3:6"),
        ("insert-copy 2:4 before 0; drop 3", "2[zeroed] 0:3 4 5"),
        ("insert-copy 2 after 2; reorder 0 1 2 3", "0:4"),
        ("insert-copy 4 before 1; replace 3 4", "0 4[zeroed] 1 2 4 4 5"),
        ("drop 2 mean", "0 1 2[attn=mean][mlp=mean] 3:6"),
        ("skip-mlp 2 mean; scale-attention 2 2", "0 1 2[mlp=mean][attn*2] 3:6"),
        ("drop 2 from 1", "0 1 2-attn-mlp[from 1] 3:6"),
        ("skip-attention 2 from 4; skip-mlp 2 from 4", "0 1 2-attn-mlp[from 4] 3:6"),
        ("scale 2:4 0.5 from 3", "0 1 2[attn*0.5][mlp*0.5][from 3] 3[attn*0.5][mlp*0.5][from 3] 4 5"),
        ("parallel 2 3", "0:3 3[parallel] 4 5"),
        ("average 1:4", "0 1[/3] 2[parallel][/3] 3[parallel][/3] 4 5"),
        ("parallel 2 3; skip-mlp 3; swap 0 5", "5 1 2 3-mlp[parallel] 4 0"),
        ("parallel 1:4; drop 1:4", "0 4 5"),
        ("reorder 0 2-attn-mlp 3[parallel] 4[parallel]", "0 3 4[parallel]"),
    ],
)
def test_text_and_route(plan: str, route: str) -> None:
    parsed = Plan.parse(plan)
    assert Plan.parse(str(parsed)) == parsed
    found = parsed.route(6)
    assert str(found) == route
    assert Route.parse(str(found)) == found


def test_a_range_of_equal_changes_is_one_word() -> None:
    assert str(ls.scale(range(1, 5), 0.5).route(6)) == "0 1:5[attn*0.5][mlp*0.5] 5"


def test_equal_visits_are_equal() -> None:
    assert Visit(3, attention=1.0, mlp=0) == Visit(3, mlp=False)
    assert Visit(3, mlp=0.0, neurons_off=(1,)) == Visit(3, mlp=False)
    assert Visit(3, heads_off=(2, 0, 2)) == Visit(3, heads_off=(0, 2))
    assert hash(Visit(3, attention=True)) == hash(Visit(3, attention=1.0))
    assert Visit(3).whole
    assert not Visit(3, heads_off=(0,)).whole
    assert Visit(3, mlp=False).skips_only
    assert not Visit(3, mlp=0.5).skips_only


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("scale 2 nan", "scaled by a finite number, not by 'nan'"),
        ("scale 2 half", "scaled by a finite number, not by 'half'"),
        ("scale 2", "expected blocks, and a factor behind them"),
        ("scale 2 1", "would change nothing"),
        ("skip-mlp 2; scale-mlp 2 0.5", "the mlp of block 2 is skipped"),
        ("skip-attention 2; heads-off 0 of 2", "the attention of block 2 is skipped"),
        ("neurons-off top 50 suppression of 2", "names neurons by their weights, so it needs the model"),
        ("neurons-off top 0 suppression of 2", "cannot read 'top 0 suppression'"),
        ("neurons-off 3 suppression of 2", "cannot read '3 suppression'"),
        ("heads-off 0 1", "expected numbers, 'of' and blocks"),
        ("heads-off x of 2", "cannot read 'x'"),
        ("heads-off -1 of 2", "cannot read '-1'"),
        ("neurons-off 5:2 of 2", "the range 5:2 is empty"),
        ("heads-off 0 of 9", "block 9 is out of range"),
        ("reorder 0 1[mlp]", r"cannot read \[mlp\]"),
        ("reorder 0 1[mlp*2][mlp*3]", "mlp is given twice"),
        ("reorder 0 1-mlp[mlp*3]", "mlp is given twice"),
        ("drop 1[mlp*2]", "has a suffix, which only routes take"),
        ("drop 2 mean from 1", "cannot be combined"),
        ("drop 2 from 0", "'from 0' is all tokens"),
        ("skip-mlp 2 from 1; skip-attention 2 from 2", "from token 1 and from token 2"),
        ("heads-off 0 of 2; skip-mlp 2 from 1", "only branches that are skipped or scaled"),
        ("take 2 from base; take 2 from other", "is taken from base, and then from other"),
        ("take 2 from my-base", "name of letters, digits and _"),
        ("take 2", "expected blocks, 'from' and the name of a source"),
        ("insert-copy 2", "expected a block, 'after' or 'before'"),
        ("insert-copy 2 after 2; skip-mlp 2", "the mlp of block 2 is already skipped"),
        ("parallel 2", "names one block"),
        ("parallel 2 4", "needs adjacent blocks"),
        ("parallel 2 3; average 3 4", "parallel already"),
        ("parallel 2 3; drop 2", r"would separate or join parallel blocks \(2 3\)"),
        ("parallel 2 3; swap 2 3", "would separate or join parallel blocks"),
        ("parallel 2 3; replace 3 5", "would separate or join parallel blocks"),
        ("parallel 2 3; repeat 3", "would separate or join parallel blocks"),
        ("heads-off 0 of 3; skip-attention 3 from 1", "only branches that are skipped or scaled"),
        ("neurons-off 0 of 3; drop 3 from 1", "only branches that are skipped or scaled"),
        ("take 2 from base; skip-mlp 2 mean", "the means are those of the loaded model"),
        ("reorder 0 1 2 2@base 3; replace 3 2", "in ways that differ"),
        ("reorder 0 1 2 2-mlp 3; reorder 0 2 3", "in ways that differ"),
        ("reorder 0[parallel] 1", r"begins with 0\[parallel\]"),
        ("reorder 0 1[/0]", "divided by a number of at least 1"),
    ],
)
def test_refused(plan: str, words: str) -> None:
    with pytest.raises(ls.PlanError, match=words):
        Plan.parse(plan).route(6)


def test_python_refuses_the_same() -> None:
    with pytest.raises(ls.PlanError, match="branch is 'attention' or 'mlp'"):
        ls.scale(3, 0.5, branch="heads")  # type: ignore[arg-type]
    with pytest.raises(ls.PlanError, match="at least one of the heads"):
        ls.heads_off(3, [])
    with pytest.raises(ls.PlanError, match="neurons are numbered from 0, not -1"):
        ls.neurons_off(3, -1)
    with pytest.raises(ls.PlanError, match="given as a whole number"):
        ls.neurons_off(3, [0.5])  # type: ignore[list-item]


def test_families_of_scaled_blocks() -> None:
    assert [variant.plan for variant in family("scale-mlp:-0.5", 3)] == [f"scale-mlp {n} -0.5" for n in range(3)]
    for name in ("scale", "scale:1", "scale:x"):
        with pytest.raises(ls.PlanError, match="takes a factor other than 1; write scale:0.5"):
            family(name, 3)


@pytest.mark.parametrize("words", ["suppression", "top 5 prediction", "random partition", "random top 3 suppression"])
def test_neurons_by_kind_are_replaced_by_their_numbers(words: str) -> None:
    plan = Plan.parse(f"drop 0; neurons-off {words} of 1:4")
    assert Plan.parse(str(plan)) == plan
    asked = []

    def pick(block: int, kind: str, count: int | None, random: bool) -> tuple[int, ...]:
        asked.append((block, kind, count, random))
        return (block, 7) if block != 2 else ()

    assert str(plan.resolved(6, pick)) == "drop 0; neurons-off 1 7 of 1; neurons-off 3 7 of 3"
    kind = words.split()[-1]
    count = next((int(word) for word in words.split() if word.isdigit()), None)
    assert asked == [(block, kind, count, words.startswith("random")) for block in (1, 2, 3)]
    assert plan.needs_weights
    assert not plan.resolved(6, pick).needs_weights
    with pytest.raises(ls.PlanError, match="no block that it names has .*analyze neurons"):
        plan.resolved(6, lambda *_: ())


def test_neurons_by_kind_of_a_block_of_another_checkpoint_are_refused() -> None:
    plan = Plan.parse("take 2 from base; neurons-off suppression of 2")
    with pytest.raises(ls.PlanError, match="block 2 is taken from base; give their numbers"):
        plan.resolved(6, lambda *_: (1,))
