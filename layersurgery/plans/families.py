"""Define the families of edits: sets of edits that a sweep makes for every block, every span or every pair of a model.

A new family gets its entry here, and appears in sweeps, figures, tables, the report and the command line.

>>> from layersurgery.plans.families import FAMILIES, Bounds
>>> [str(member.edit) for member in FAMILIES["swap"].members(Bounds(range(4), depth=4))]
['swap 0 1', 'swap 1 2', 'swap 2 3']
>>> [family.usage for family in FAMILIES.values() if family.axes]
['heads', 'drop-spans', 'repeat-spans[:TIMES]', 'jump', 'replace', 'swap-pairs']
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, permutations

from ..errors import PlanError, UnsupportedEditError
from ..registry import NEURON_KINDS
from .block_edits import Drop, Parallel, Reorder, Repeat, Replace, Reverse, Swap, Take
from .branch_edits import PickNeurons, Scale, Skip, UnitsOff
from .edits import Edit, parse_edit
from .route import Ref, RouteItem, Span
from .visit import Branch, factor_text

Cell = tuple[int, int]
"""The place of an edit in a map: the block of its row and the block, or the head, of its column."""
CountHeads = Callable[[int], int]
"""Returns the number of attention heads of a block; see `Bounds.heads`."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bound what the edits of a family may touch.

    Attributes:
        blocks: the blocks.
        depth: number of blocks of the model.
        max_span: length of the longest span, and largest distance of two blocks; None for no limit.
        number: the whole number that follows the family's name; 0 if none does.
        factor: the factor that follows the family's name; 1 if none does.
        source: the name of the source that follows the family's name; empty if none does.
        heads: returns the number of attention heads of a block, or raises `UnsupportedEditError` if they cannot be
            turned off; None if there is no model to ask.
        neurons: returns the neurons of a block by kind; None if there is no model to ask.
    """

    blocks: range
    depth: int
    max_span: int | None = None
    number: int = 0
    factor: float = 1
    source: str = ""
    heads: CountHeads | None = None
    neurons: PickNeurons | None = None

    def spans(self) -> Iterator[Cell]:
        """Yield the first block and the end of every span, in the order of the first blocks, short ones first."""
        for start in self.blocks:
            longest = self.blocks.stop - start
            for length in range(1, min(longest, self.max_span or longest) + 1):
                yield start, start + length

    def pairs(self) -> Iterator[Cell]:
        """Yield every ordered pair of two blocks."""
        for first, second in permutations(self.blocks, 2):
            if self.max_span is None or abs(first - second) <= self.max_span:
                yield first, second

    def middles(self) -> Iterator[Cell]:
        """Yield the first block and the end of all blocks, then without the first and the last, and so on."""
        for start, stop in zip(self.blocks, range(self.blocks.stop, 0, -1), strict=False):
            if stop - start >= 2 and (self.max_span is None or stop - start <= self.max_span):
                yield start, stop


@dataclass(frozen=True, slots=True)
class Member:
    """Hold an edit of a family.

    Attributes:
        edit: the edit.
        layer: the layer that it is drawn at; the first block that it names if None.
        cell: its place in the family's map; None if the family has no map.
    """

    edit: Edit
    layer: int | None = None
    cell: Cell | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """Describe the number that follows a family's name.

    Attributes:
        name: how it is written in the usage.
        what: what it counts.
        of: returns the number of an edit in a model of some depth; None if edits of one layer do not differ in it.
        default: its value if it is left out; None if it must be given.
        least: its smallest value.
        whole: whether it is a whole number; else it is any finite number except 1.
        one: what it counts if it is 1; `what` if empty.
    """

    name: str
    what: str
    of: Callable[[Edit, int], float] | None
    default: int | None = None
    least: int = 1
    whole: bool = True
    one: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of edits.

    Attributes:
        name: its name, in texts of edits and in the column "edit" of results.
        help: what its edits do, in a sentence without a full stop.
        title: what one of its edits does, for a figure.
        label: a short form of the title, for a list.
        members: returns its edits within bounds, in the order of their first blocks.
        per_layer: whether each edit belongs to one layer, so that it is drawn over depth.
        number: the number that follows the name, as in "drop-span:4"; None if none does.
        width: number of adjacent blocks that each edit changes; 0 if edits differ in it.
        axes: the labels of the rows and of the columns of its map; empty if it has none.
        symmetric: whether the map has one cell for both orders of two blocks.
        bounded: whether `max_span` bounds its edits.
        has_source: whether the name of a source follows the family's name, as in "replace-from:base".
        of_blocks: whether rows and columns of its map are blocks, so that it has two sides of a diagonal.
    """

    name: str
    help: str
    title: str
    label: str
    members: Callable[[Bounds], Iterator[Member]]
    per_layer: bool = True
    number: Number | None = None
    width: int = 0
    axes: tuple[str, str] | tuple[()] = ()
    symmetric: bool = False
    bounded: bool = False
    has_source: bool = False
    of_blocks: bool = True

    @property
    def usage(self) -> str:
        """Return how the family is written in a text of edits."""
        if self.number is None:
            return f"{self.name}:SOURCE" if self.has_source else self.name
        return f"{self.name}:{self.number.name}" if self.number.default is None else f"{self.name}[:{self.number.name}]"

    def lines(self, plans: Iterable[str], layers: Iterable[int], depth: int) -> list[str]:
        """Return for each of the family's edits the name of its line over depth, where they form several lines.

        Args:
            plans: the plans' texts.
            layers: the layer of each.
            depth: number of blocks of the model.

        Example:
            >>> from layersurgery.plans.families import FAMILIES
            >>> FAMILIES["drop-span"].lines(["drop 4:8", "drop 4:6"], [4, 4], 32)
            ['4 blocks', '2 blocks']
            >>> FAMILIES["shuffle"].lines(["reorder 1 0 2", "reorder 2 0 1"], [0, 0], 3)
            ['order 1', 'order 2']
        """
        number = self.number
        if self.has_source:
            sources = [_source_of(parse_edit(plan)) for plan in plans]
            return [f"from {source}" if len(set(sources)) > 1 else "" for source in sources]
        if number is None:
            return [""] * len(list(plans))
        if (of := number.of) is None:
            count: Counter[int] = Counter()
            return [f"{number.what.removesuffix('s')} {count.update([layer]) or count[layer]}" for layer in layers]
        values = [of(parse_edit(plan), depth) for plan in plans]
        names = [f"{factor_text(value)} {number.one if value == 1 and number.one else number.what}" for value in values]
        return names if len(set(names)) > 1 else [""] * len(names)

    def written(self, plans: Iterable[str], layers: Iterable[int], depth: int) -> list[str]:
        """Return how the families that gave these edits are written, each with its number.

        Args:
            plans: the plans' texts.
            layers: the layer of each.
            depth: number of blocks of the model.

        Example:
            >>> from layersurgery.plans.families import FAMILIES
            >>> FAMILIES["drop-span"].written(["drop 4:8", "drop 4:6"], [4, 4], 32)
            ['drop-span:2', 'drop-span:4']
        """
        edits = list(map(parse_edit, plans))
        if self.has_source:
            return list(dict.fromkeys(f"{self.name}:{_source_of(edit)}" for edit in edits))
        if self.number is None or not edits:
            return [self.name] * bool(edits)
        of = self.number.of
        numbers = {of(edit, depth) for edit in edits} if of else {max(Counter(layers).values())}
        return [
            self.name if number == self.number.default else f"{self.name}:{factor_text(number)}"
            for number in sorted(numbers)
        ]


def _swap(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Swap(block, block + 1)) for block in bounds.blocks[:-1])


def _parallel_pairs(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Parallel((Span(block, block + 2),))) for block in bounds.blocks[:-1])


def _drop(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Drop((block,))) for block in bounds.blocks if bounds.depth > 1)


def _replace_from(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Take((block,), bounds.source)) for block in bounds.blocks)


def _source_of(edit: Edit) -> str:
    assert isinstance(edit, Take)
    return edit.source


def _skip_attention(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Skip("attention", (block,))) for block in bounds.blocks)


def _skip_mlp(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Skip("mlp", (block,))) for block in bounds.blocks)


def _mean(branch: Branch | None, bounds: Bounds) -> Iterator[Member]:
    for block in bounds.blocks:
        yield Member(Drop((block,), mean=True) if branch is None else Skip(branch, (block,), mean=True))


def _scale(branch: Branch | None, bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Scale((block,), bounds.factor, branch)) for block in bounds.blocks)


def _heads(bounds: Bounds) -> Iterator[Member]:
    if bounds.heads is None:
        raise PlanError("heads: how many heads a block has is not known without a model; use it where one is measured")
    for block in bounds.blocks:
        try:
            count = bounds.heads(block)
        except UnsupportedEditError:
            count = 1  # what measures this edit skips it and says why
        yield from (Member(UnitsOff("attention", (head,), (block,)), cell=(block, head)) for head in range(count))


def _neurons_of_kind(kind: str, random: bool, bounds: Bounds) -> Iterator[Member]:
    if bounds.neurons is None:
        raise PlanError(
            f"{kind} neurons are known by their weights, so this family needs a model; use it where one is measured"
        )
    for block in bounds.blocks:
        if neurons := bounds.neurons(block, kind, None, random):
            yield Member(UnitsOff("mlp", neurons, (block,)))


def _drop_span(bounds: Bounds) -> Iterator[Member]:
    for start in bounds.blocks[: max(0, len(bounds.blocks) - bounds.number + 1)]:
        yield Member(Drop((Span(start, start + bounds.number),)))


def _drop_spans(bounds: Bounds) -> Iterator[Member]:
    for start, stop in bounds.spans():
        if stop - start < bounds.depth:
            yield Member(Drop((_blocks(start, stop),)), cell=(start, stop))


def _repeat_spans(bounds: Bounds) -> Iterator[Member]:
    for start, stop in bounds.spans():
        yield Member(Repeat(_blocks(start, stop), bounds.number or 2), cell=(stop, start))


def _jump(bounds: Bounds) -> Iterator[Member]:
    yield from chain(_drop_spans(bounds), _repeat_spans(bounds))


def _replace(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Replace(*pair), cell=pair) for pair in bounds.pairs())


def _swap_pairs(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Swap(*pair), cell=pair) for pair in bounds.pairs() if pair[0] < pair[1])


def _copy(bounds: Bounds) -> Iterator[Member]:
    start = bounds.blocks.start
    for stop in range(start + 1, bounds.blocks.stop + 1):
        if bounds.max_span is None or stop - start <= bounds.max_span:
            several = stop - start > 1
            yield Member(Repeat(_blocks(start, stop), bounds.number + 1, each=several), layer=stop - 1)


def _exit(bounds: Bounds) -> Iterator[Member]:
    for block in bounds.blocks:
        if block + 1 < bounds.depth:
            yield Member(Drop((Span(block + 1, bounds.depth),)), layer=block)


def _reverse_middle(bounds: Bounds) -> Iterator[Member]:
    yield from (Member(Reverse(Span(*middle))) for middle in bounds.middles())


def _shuffle(bounds: Bounds) -> Iterator[Member]:
    for start, stop in bounds.middles():
        for seed in range(bounds.number):
            order, generator = list(range(start, stop)), random.Random(seed)
            while order == list(range(start, stop)):
                generator.shuffle(order)
            yield Member(_reorder(start, order, stop, bounds.depth), layer=start)


def _centre(bounds: Bounds) -> Iterator[Member]:
    for start, stop in bounds.middles():
        yield Member(_reorder(start, [(start + stop) // 2] * (stop - start), stop, bounds.depth), layer=start)


def _blocks(start: int, stop: int) -> Ref:
    """Return the reference to a span as a user would write it: a block by its number."""
    return start if stop - start == 1 else Span(start, stop)


def _reorder(start: int, middle: list[int], stop: int, depth: int) -> Reorder:
    """Return the edit that gives the blocks of a span another order, and leaves those around it."""
    refs: list[Ref] = [
        *([_blocks(0, start)] if start else []),
        *middle,
        *([_blocks(stop, depth)] if stop < depth else []),
    ]
    return Reorder(tuple(map(RouteItem, refs)))


def _span_length(edit: Edit, depth: int) -> int:
    return len(edit.first_blocks(depth))


def _passes(edit: Edit, _depth: int) -> int:
    assert isinstance(edit, Repeat)
    return edit.times


def _factor(edit: Edit, _depth: int) -> float:
    assert isinstance(edit, Scale)
    return edit.by


def _copies(edit: Edit, depth: int) -> int:
    return _passes(edit, depth) - 1


_MIDDLE = "for all blocks, then without the first and the last, and so on"

_SCALED: tuple[tuple[Branch | None, str, str], ...] = (
    (None, "a block", "block"), ("attention", "a block's attention", "attention"), ("mlp", "a block's MLP", "MLP"),
)  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "swap", "swap every two adjacent blocks", "swap a block with the next", "swap", _swap, width=2,
        ),
        Family("drop", "drop every block", "drop a block", "drop", _drop, width=1),
        Family(
            "skip-attention", "skip the attention of every block", "skip a block's attention", "skip attention",
            _skip_attention, width=1,
        ),
        Family("skip-mlp", "skip the MLP of every block", "skip a block's MLP", "skip MLP", _skip_mlp, width=1),
        Family(
            "replace-from",
            "run every block of another checkpoint in the place of the model's; written replace-from:SOURCE",
            "take a block from another checkpoint", "replace from", _replace_from, width=1, has_source=True,
        ),
        *(
            Family(
                f"{verb}-mean", f"replace what {what} adds by its mean over tokens", f"replace {what} by its mean",
                f"mean of {short}", partial(_mean, branch), width=1,
            )
            for (branch, what, short), verb in zip(_SCALED, ("drop", "skip-attention", "skip-mlp"), strict=True)
        ),
        *(
            Family(
                f"scale{'-' * bool(branch)}{branch or ''}",
                f"multiply what {what} adds to the stream; written scale{'-' * bool(branch)}{branch or ''}:0.5",
                f"scale {what}", f"scale {short}", partial(_scale, branch), width=1,
                number=Number("FACTOR", "times", _factor, whole=False),
            )
            for branch, what, short in _SCALED
        ),
        Family(
            "parallel-pairs", "give every two adjacent blocks the same input, and sum what they add",
            "run a block and the next in parallel", "parallel pair", _parallel_pairs, width=2,
        ),
        Family(
            "heads", "turn every head of every block's attention off", "turn an attention head off", "head off", _heads,
            per_layer=False, axes=("block", "head"), of_blocks=False,
        ),
        *(
            Family(
                f"{'random-' * random}{kind}-neurons",
                f"turn {'as many random neurons as' if random else 'all'} {kind} neurons of every block off",
                f"turn {'as many random neurons' if random else f'{kind} neurons'} off",
                f"{'random for ' * random}{kind}", partial(_neurons_of_kind, kind, random), width=1,
            )
            for kind in NEURON_KINDS for random in (False, True)
        ),
        Family(
            "drop-span", "drop every N adjacent blocks; written drop-span:N", "drop adjacent blocks", "drop a span",
            _drop_span, number=Number("N", "blocks", _span_length, one="block"),
        ),
        Family(
            "drop-spans", "drop every span of blocks", "drop a span", "drop any span", _drop_spans, per_layer=False,
            axes=("first block dropped", "next block that runs"), bounded=True,
        ),
        Family(
            "repeat-spans", "repeat every span of blocks; repeat-spans:3 for three passes in total", "repeat a span",
            "repeat any span", _repeat_spans, per_layer=False, number=Number("TIMES", "passes", _passes, 2, 2),
            axes=("block after the span", "first block repeated"), bounded=True,
        ),
        Family(
            "jump", "drop every span and repeat every span", "jump to a later or an earlier block", "jump", _jump,
            per_layer=False, axes=("leaves before block", "continues with block"), bounded=True,
        ),
        Family(
            "replace", "run every block in the place of every other", "run another block in a block's place",
            "replace a block", _replace, per_layer=False, axes=("block replaced", "block that runs in its place"),
            bounded=True,
        ),
        Family(
            "swap-pairs", "swap every two blocks", "swap two blocks", "swap two blocks", _swap_pairs, per_layer=False,
            axes=("block", "swapped with block"), symmetric=True, bounded=True,
        ),
        Family(
            "copy", "pass N more times through each of the blocks up to every block; written copy:N",
            "repeat each block up to this one", "copy layers", _copy,
            number=Number("N", "copies", _copies, one="copy"), bounded=True,
        ),
        Family("exit", "end the model after every block", "end the model after a block", "exit", _exit),
        Family(
            "reverse-middle", f"reverse the blocks, {_MIDDLE}", "reverse the middle from this block",
            "reverse the middle", _reverse_middle, bounded=True,
        ),
        Family(
            "shuffle", f"put the blocks into N random orders, {_MIDDLE}; written shuffle:N",
            "shuffle the middle from this block", "shuffle the middle", _shuffle,
            number=Number("N", "orders", None), bounded=True,
        ),
        Family(
            "centre", f"run the centre block in the place of all blocks, {_MIDDLE}",
            "repeat the centre block in place of the middle from this block", "centre block only", _centre,
            bounded=True,
        ),
    )
}  # fmt: skip
"""The families by name, in the order in which they are listed and drawn."""
