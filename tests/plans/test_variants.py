"""The sets of edits that a sweep measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.plans.block_edits import Drop
from layersurgery.plans.families import FAMILIES, Family
from layersurgery.plans.variants import family, is_family, layer_range, read_plans, unedited, variants


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("swap", ["swap 0 1", "swap 1 2", "swap 2 3"]),
        ("drop", ["drop 0", "drop 1", "drop 2", "drop 3"]),
        ("skip-attention", [f"skip-attention {block}" for block in range(4)]),
        ("skip-mlp", [f"skip-mlp {block}" for block in range(4)]),
        ("drop-mean", [f"drop {block} mean" for block in range(4)]),
        ("skip-mlp-mean", [f"skip-mlp {block} mean" for block in range(4)]),
        ("drop-span:2", ["drop 0:2", "drop 1:3", "drop 2:4"]),
        ("swap-pairs", ["swap 0 1", "swap 0 2", "swap 0 3", "swap 1 2", "swap 1 3", "swap 2 3"]),
    ],
)
def test_every_family(name: str, plans: list[str]) -> None:
    found = family(name, 4)
    assert [variant.plan for variant in found] == plans
    for variant in found:
        plan = ls.Plan.parse(variant.plan)
        assert variant.route == plan.route(4)
        assert variant.edit == name.partition(":")[0]
        assert variant.name == variant.plan
        assert variant.layer == int(
            "".join(filter(lambda c: c.isdigit() or c == " ", variant.plan.replace(":", " "))).split()[0]
        )


def test_what_is_asked_for_twice_is_meant_once() -> None:
    assert variants("drop,drop", 6) == variants("drop", 6)


def written(kind: Family) -> str:
    return f"{kind.name}:3" if kind.number else f"{kind.name}:base" if kind.has_source else kind.name


def test_layers_restrict_to_edits_that_touch_no_other_block() -> None:
    for kind in FAMILIES.values():
        if kind.name == "exit":  # it ends the model after these blocks
            continue
        found = family(written(kind), 10, range(2, 7), heads=lambda _block: 2, neurons=lambda *_: (0, 1))
        assert found, kind.name
        for variant in found:
            blocks = variant.route.blocks
            assert blocks[:2] == (0, 1)
            assert blocks[-3:] == (7, 8, 9)
            assert set(blocks[2:-3]) <= set(range(2, 7))
    assert [variant.plan for variant in family("swap", 10, range(8, 10))] == ["swap 8 9"]
    assert family("drop-span:4", 10, range(2, 5)) == []
    assert variants("swap", 10, "-2:") == family("swap", 10, "8:10") == family("swap", 10, range(8, 10))
    assert [variant.plan for variant in family("exit", 10, "4:6")] == ["drop 5:10", "drop 6:10"]


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_a_map_has_every_span_or_pair_once(depth: int) -> None:
    spans = {(start, stop) for start in range(depth) for stop in range(start + 1, depth + 1)}
    drops = spans - {(0, depth)}
    repeats = {(stop, start) for start, stop in spans}
    assert _cells("drop-spans", depth) == drops
    assert _cells("repeat-spans", depth) == _cells("repeat-spans:3", depth) == repeats
    assert _cells("jump", depth) == drops | repeats
    pairs = {(first, second) for first in range(depth) for second in range(depth) if first != second}
    assert _cells("replace", depth) == pairs
    assert _cells("swap-pairs", depth) == {pair for pair in pairs if pair[0] < pair[1]}
    for name in ("drop-spans", "repeat-spans", "jump", "replace", "swap-pairs"):
        assert _cells(name, depth, 2) == {
            (row, column) for row, column in _cells(name, depth) if abs(row - column) <= 2
        }


def _cells(name: str, depth: int, max_span: int | None = None) -> set[tuple[int, int]]:
    """The cells of a family's map; each edit has one, and no two edits share one."""
    cells = [variant.cell for variant in family(name, depth, max_span=max_span)]
    assert None not in cells
    assert len(cells) == len(set(cells))
    return {cell for cell in cells if cell}


def test_a_cell_says_where_the_stream_jumps() -> None:
    for variant in family("jump", 7):
        assert variant.cell
        at, to = variant.cell
        assert variant.route.blocks == (*range(at), *range(to, 7))
    for variant in family("repeat-spans:3", 7):
        assert variant.cell
        end, start = variant.cell
        assert variant.route.blocks == (*range(end), *range(start, end), *range(start, end), *range(end, 7))
    for variant in family("replace", 7):
        assert variant.cell
        place, block = variant.cell
        assert variant.route.blocks == (*range(place), block, *range(place + 1, 7))


def test_families_of_the_middle() -> None:
    assert [str(variant.route) for variant in family("reverse-middle", 6)] == [
        "5 4 3 2 1 0",
        "0 4 3 2 1 5",
        "0 1 3 2 4 5",
    ]
    assert [str(variant.route) for variant in family("centre", 5)] == ["2 2 2 2 2", "0 2 2 2 4"]
    assert [variant.route.blocks for variant in family("copy:1", 3)] == [
        (0, 0, 1, 2),
        (0, 0, 1, 1, 2),
        (0, 0, 1, 1, 2, 2),
    ]
    assert [variant.layer for variant in family("copy:1", 3)] == [0, 1, 2]
    assert [variant.layer for variant in family("exit", 4)] == [0, 1, 2]
    orders = family("shuffle:3", 8)
    assert [variant.layer for variant in orders] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert len(variants("shuffle:3", 8)) == 10  # two blocks have one other order
    for variant in orders:
        assert sorted(variant.route.blocks) == list(range(8))
        assert variant.route.blocks[: variant.layer] == tuple(range(variant.layer or 0))
    assert orders == family("shuffle:3", 8)  # the same in every process
    assert orders[0].plan == "reorder 4 1 5 2 0 3 7 6"


def test_copies_pass_through_each_block_by_itself() -> None:
    assert [str(ls.repeat(range(1, 3), each=True).route(4)), str(ls.repeat(range(1, 3)).route(4))] == [
        "0 1 1 2 2 3", "0:3 1:4",
    ]  # fmt: skip
    assert str(ls.repeat(range(1, 3), 3, each=True)) == "repeat 1:3 each x3"


def test_a_family_says_how_it_is_written_and_drawn() -> None:
    assert [name for name, kind in FAMILIES.items() if kind.per_layer] == [
        "swap", "drop", "skip-attention", "skip-mlp", "replace-from", "drop-mean", "skip-attention-mean",
        "skip-mlp-mean", "scale", "scale-attention", "scale-mlp", "parallel-pairs", "prediction-neurons",
        "random-prediction-neurons", "suppression-neurons", "random-suppression-neurons", "partition-neurons",
        "random-partition-neurons", "drop-span", "copy", "exit", "reverse-middle", "shuffle", "centre",
    ]  # fmt: skip
    for name, kind in FAMILIES.items():
        assert kind.name == name
        found = family(written(kind), 8, heads=lambda _block: 2, neurons=lambda *_: (0, 1))
        texts = kind.written([variant.plan for variant in found], [variant.layer or 0 for variant in found], 8)
        assert texts == [written(kind)]
        if kind.width:
            assert {len(set(range(8)) - set(_untouched(variant.plan))) for variant in found} == {kind.width}
    assert FAMILIES["repeat-spans"].written(["repeat 1", "repeat 1 x3"], [1, 1], 4) == [
        "repeat-spans",
        "repeat-spans:3",
    ]
    assert FAMILIES["drop"].written([], [], 4) == []
    plans = ["take 1 from a", "take 1 from b"]
    assert FAMILIES["replace-from"].written(plans, [1, 1], 4) == ["replace-from:a", "replace-from:b"]
    assert FAMILIES["replace-from"].lines(plans, [1, 1], 4) == ["from a", "from b"]
    assert FAMILIES["replace-from"].lines(plans[:1], [1], 4) == [""]


def test_edits_of_one_layer_form_lines() -> None:
    assert FAMILIES["drop-span"].lines(["drop 2:4", "drop 3:6"], [2, 3], 8) == ["2 blocks", "3 blocks"]
    assert FAMILIES["drop-span"].lines(["drop 2:4", "drop 3:5"], [2, 3], 8) == ["", ""]
    assert FAMILIES["copy"].lines(["repeat 0 x3", "repeat 0"], [0, 0], 8) == ["2 copies", "1 copy"]
    assert FAMILIES["swap"].lines(["swap 3 4"], [3], 8) == [""]


def test_max_span_bounds_spans_and_pairs_only() -> None:
    with pytest.raises(
        ls.PlanError, match=r"^`max_span` has no effect on these edits; it bounds drop-spans, repeat-spans"
    ):
        variants("swap,drop", 8, max_span=2)
    with pytest.raises(ls.PlanError, match=r"^`max_span` is a number of blocks, at least 1, not 0$"):
        variants("jump", 8, max_span=0)
    with pytest.raises(ls.PlanError, match=r"^`max_span` is given as a whole number, not as 1\.5$"):
        variants("jump", 8, max_span=1.5)  # type: ignore[arg-type]
    found = variants("drop,jump", 8, max_span=1)
    assert (len(found), len({variant.route for variant in found})) == (24, 16)  # a jump over one block is a drop


def _untouched(text: str) -> list[int]:
    route = ls.Plan.parse(text).route(8)
    alone = [group[0].block for group in route.groups if len(group) == 1]
    return [
        visit.block
        for position, visit in enumerate(route)
        if (visit == ls.Visit(position) and position in alone) or len(route) < 8
    ]


def test_any_form() -> None:
    named = variants({"shallow": "drop 3:5", "odd": ls.swap(1) + ls.drop(4)}, 6)
    assert [(variant.name, variant.plan, variant.edit, variant.layer) for variant in named] == [
        ("shallow", "drop 3:5", "plan", 3),
        ("odd", "swap 1 2; drop 4", "plan", 1),
    ]
    mixed = variants(["swap", ls.repeat(2), "move 4 after 0", ls.Route.parse("0:3 4-attn 3 5")], 6)
    assert [variant.plan for variant in mixed[5:]] == ["repeat 2", "move 4 after 0", "reorder 0:3 4-attn 3 5"]
    assert mixed[-1].route == ls.Route.parse("0:3 4-attn 3 5")
    assert [variant.layer for variant in mixed[5:]] == [2, 4, 4]
    assert len(variants("swap,drop", 6)) == len(variants(["swap", "drop"], 6)) == 11
    assert variants("reverse -3:", 6)[0].layer == 3
    assert variants(ls.Route.identity(6), 6)[0].route == unedited(6).route
    assert is_family("swap, drop-span:3")
    assert not is_family("swap 1 2")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("swap,dorp", "unknown family of edits 'dorp'; did you mean 'drop'"),
        ("swap, dorp", "unknown family of edits 'dorp'; did you mean 'drop'"),
        ("scale-mlp:0.5,zzz", "unknown family of edits 'zzz'; they are swap, drop"),
        ("remove", "unknown family of edits 'remove'; did you mean 'drop'"),
        ("zzz", "unknown family of edits 'zzz'; they are swap, drop"),
        ("drop-span", "takes a number of blocks, 1 to 9999; write drop-span:4"),
        ("drop-span:0", "takes a number of blocks, 1 to 9999"),
        ("repeat-spans:1", "takes a number of passes, 2 to 9999; write repeat-spans:4"),
        ("shuffle:99999", "takes a number of orders, 1 to 9999"),
        ("drop-span:6", "'drop 0:6' removes all 6 blocks; keep at least one"),
        ("drop-span:7", "drop-span:7: the model has only 6 blocks; use a shorter span"),
        ("swap:2", "swap takes no number"),
        ("wsap 1 2", "unknown edit 'wsap'.*did you mean 'swap'"),
        (ls.Route((7,)), "the route visits block 7, and the model has 6 blocks"),
        (ls.Route(()), "the route leaves no block"),
        ([], "nothing to measure"),
        (7, "expected families"),
        (ls.Plan(), "an empty plan is the unedited model"),
        (["drop 0:6"], "removes all 6 blocks"),
    ],
)
def test_what_cannot_be_meant(wanted: Any, words: str) -> None:
    with pytest.raises(ls.PlanError, match=words):
        variants(wanted, 6)


def test_layers_out_of_range_and_layers_without_an_edit() -> None:
    with pytest.raises(ls.PlanError, match=r"layers 4:8 are out of range: the model has 6 blocks"):
        variants("swap", 6, range(4, 8))
    with pytest.raises(
        ls.PlanError, match="nothing to measure: 'swap' has no edit of a model of 6 blocks with layers 2:3"
    ):
        variants("swap", 6, range(2, 3))
    assert layer_range(None, 6) is None
    assert layer_range("4:", 6) == range(4, 6)
    for wrong, words in {
        "3": "`layers` takes one half-open range, for example 4:20, not '3'",
        "1:3 4:6": "one half-open range",
        "1:3-mlp": "one half-open range",
        "4:9": "the range 4:9 is out of range",
        range(0, 6, 2): r"a range of adjacent blocks, for example range\(4, 20\) or '4:20', not range\(0, 6, 2\)",
        range(3, 3): "a range of adjacent blocks",
        range(-2, 0): "layers -2:0 are out of range",
        (1, 3): r"a range of adjacent blocks.* not \(1, 3\)",
    }.items():
        with pytest.raises(ls.PlanError, match=words):
            variants("swap", 6, wrong)  # type: ignore[arg-type]


def test_a_file_of_plans() -> None:
    text = "# mine\nshallow: drop 20:24\n\nswap 1 2; drop 3  # no name\nlong-one.2:  repeat 8:16 x3\n"
    assert {name: str(plan) for name, plan in read_plans(text, "f").items()} == {
        "shallow": "drop 20:24",
        "swap 1 2; drop 3": "swap 1 2; drop 3",
        "long-one.2": "repeat 8:16 x3",
    }
    for wrong, words in {
        "a: drop 1\na: drop 2": "f, line 2: a second plan has the name 'a'",
        "\nb: dorp 1": "f, line 2: unknown edit 'dorp'.*did you mean 'drop'",
        "# nothing": "f contains no plan",
    }.items():
        with pytest.raises(ls.PlanError, match=words):
            read_plans(wrong, "f")


@pytest.mark.parametrize("layers", [[1, 2], (1, 2), np.array([1, 2]), range(1, 3), "1:3", {1, 2}])
def test_layers_are_a_range_in_any_form(layers: Any) -> None:
    assert [variant.plan for variant in family("drop", 6, layers)] == ["drop 1", "drop 2"]
    assert layer_range(np.int64(2), 6) == range(2, 3)


@pytest.mark.parametrize("layers", [[1, 3], [2, 1], [], [1.0, 2.0], [True, False], {1: 2}, [5, 6]])
def test_layers_that_are_not_a_range(layers: Any) -> None:
    with pytest.raises(ls.PlanError, match="`layers` takes a range of adjacent blocks"):
        layer_range(layers, 6)


@pytest.mark.parametrize(
    "edits",
    [
        np.array(["drop 1", "drop 2"]),
        pd.Series(["drop 1", "drop 2"]),
        (ls.drop(block) for block in (1, 2)),
        [Drop((1,)), Drop((2,))],
        pd.Series([1, 2]).map(ls.drop),
    ],
)
def test_edits_in_any_iterable(edits: Any) -> None:
    assert [variant.plan for variant in variants(edits, 6)] == ["drop 1", "drop 2"]
