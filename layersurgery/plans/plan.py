"""Plans: sequences of edits, as values and as text.

>>> from layersurgery import Plan, drop, swap
>>> plan = swap(12) + drop(20)
>>> str(plan)
'swap 12 13; drop 20'
>>> str(plan.route(32))
'0:12 13 12 14:20 21:32'
>>> Plan.parse("swap 12 13; drop 20") == plan
True
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from ..errors import PlanError
from .block_edits import Drop, InsertCopy, Move, Parallel, Reorder, Repeat, Replace, Reverse, Swap, Take
from .branch_edits import NeuronsOfKind, PickNeurons, Scale, Skip, UnitsOff
from .edits import Edit, parse_edit
from .html import plan_html
from .route import Ref, Route, RouteItem, Span, parse_items
from .visit import Branch, Visit, as_int, unit_numbers, whole_number

Blocks = SupportsIndex | range | Iterable[SupportsIndex | range]
"""Blocks of a model in Python: a number, a range, or a list of these. Integers of NumPy and torch are numbers, too."""

_SLUG_LIMIT = 80


@dataclass(frozen=True, slots=True)
class Plan:
    """A sequence of edits. Plans can be added, print as text, and give a `Route` once the depth is known."""

    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.edits, str):
            raise PlanError(f"Plan() takes edits, not text; use Plan.parse({self.edits!r})")
        edits = tuple(self.edits) if isinstance(self.edits, Iterable) else (self.edits,)
        if wrong := [edit for edit in edits if not isinstance(edit, Edit)]:
            raise PlanError(f"Plan() takes edits, not {wrong[0]!r}; join plans with +, as in swap(12) + drop(20)")
        object.__setattr__(self, "edits", edits)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan's text: edits separated by semicolons or line ends; `#` starts a comment.

        Raises:
            PlanError: an unknown edit (with the nearest known one) or arguments that cannot be read.
        """
        lines = (line.split("#", 1)[0] for line in text.splitlines())
        edits = [parse_edit(part) for line in lines for part in line.split(";") if part.strip()]
        if not edits:
            raise PlanError("the plan is empty: write at least one edit, as in 'swap 12 13; drop 20'")
        return cls(tuple(edits))

    def route(self, depth: int) -> Route:
        """Return the route of this plan through a model of `depth` blocks.

        A block with both branches skipped adds nothing and is removed, so that plans for the same model give the same
        route.

        Raises:
            PlanError: an edit does not fit the depth or the edits before it, or the route has no block.
        """
        if depth < 1:
            raise PlanError(f"a model has at least one block, not {depth}")
        route = Route.identity(depth)
        for edit in self.edits:
            route = edit.apply(route, depth)
        if not route.canonical:
            raise PlanError(f"'{self}' removes all {depth} blocks; keep at least one")
        return route.checked(depth)

    @property
    def needs_weights(self) -> bool:
        """Return whether it names neurons by kind, which only the weights of a model tell."""
        return any(isinstance(edit, NeuronsOfKind) for edit in self.edits)

    def resolved(self, depth: int, pick: PickNeurons) -> Plan:
        """Return the plan with the numbers of the neurons that it names by kind.

        Args:
            depth: number of blocks of the model.
            pick: returns the neurons of a block.

        Raises:
            PlanError: no block has such a neuron, or one of them is taken from another checkpoint.
        """
        edits: list[Edit] = []
        for edit in self.edits:
            edits += edit.resolved(depth, pick) if isinstance(edit, NeuronsOfKind) else [edit]
        plan = Plan(tuple(edits))
        of_kind = {block for edit in self.edits if isinstance(edit, NeuronsOfKind) for block in edit.all_blocks(depth)}
        for visit in plan.route(depth) if of_kind else ():
            if visit.source and visit.block in of_kind:
                raise PlanError(
                    f"'{self}': neurons are looked up by kind in the loaded model, and block {visit.block} is taken "
                    f"from {visit.source}; give their numbers"
                )
        return plan

    @property
    def slug(self) -> str:
        """Return a short name for files: "swap-12-13", "drop-20to24", "swap-12-13_drop-20", "drop-end1"."""
        texts = (re.sub(r"(?<=[ :])-(?=\d)", "end", str(edit)).replace(":", "to") for edit in self.edits)
        slug = "_".join(re.sub(r"[^a-z0-9-]+", "-", text).strip("-") for text in texts)
        if len(slug) > _SLUG_LIMIT:
            slug = f"{slug[: _SLUG_LIMIT - 9].rstrip('-_')}-{hashlib.sha256(str(self).encode()).hexdigest()[:8]}"
        return slug

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.edits + other.edits) if isinstance(other, Plan) else NotImplemented

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __str__(self) -> str:
        return "; ".join(map(str, self.edits))

    def _repr_html_(self) -> str:
        return plan_html(map(str, self.edits))

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})" if self.edits else "Plan()"


def swap(first: SupportsIndex, second: SupportsIndex | None = None) -> Plan:
    """Exchange two blocks; with one number, that block and the next one."""
    edit = Swap.with_next(_block(first)) if second is None else Swap(_block(first), _block(second))
    return Plan((edit,))


def drop(*blocks: Blocks, mean: bool = False, start: SupportsIndex = 0) -> Plan:
    """Remove blocks from the model.

    With `mean`, they add the mean over tokens of what they add; with `start`, they run for so many first tokens.
    """
    return Plan((Drop(_refs(blocks, "drop"), mean, whole_number(start, "`start`")),))


def move(blocks: Blocks, *, after: SupportsIndex | None = None, before: SupportsIndex | None = None) -> Plan:
    """Move a block, or a span of adjacent blocks, to right after or right before another block."""
    targets = [None if target is None else _block(target) for target in (after, before)]
    return Plan((Move(adjacent_blocks(blocks, "move"), *targets),))


def insert_copy(blocks: Blocks, *, after: SupportsIndex | None = None, before: SupportsIndex | None = None) -> Plan:
    """Insert copies of blocks with output projections of zero: the model computes the same, and is deeper."""
    targets = [None if target is None else _block(target) for target in (after, before)]
    return Plan((InsertCopy(adjacent_blocks(blocks, "insert_copy"), *targets),))


def take(blocks: Blocks, source: str) -> Plan:
    """Run the blocks of another checkpoint, by the name of a source, in the place of those of the same numbers."""
    return Plan((Take(_refs([blocks], "take"), source),))


def parallel(*blocks: Blocks) -> Plan:
    """Give adjacent blocks the same stream, and sum what they add to it."""
    return Plan((Parallel(_refs(blocks, "parallel")),))


def average(*blocks: Blocks) -> Plan:
    """Give adjacent blocks the same stream, and add the mean of what they add to it."""
    return Plan((Parallel(_refs(blocks, "average"), average=True),))


def repeat(blocks: Blocks, times: SupportsIndex = 2, *, each: bool = False) -> Plan:
    """Pass through a block, or a span as a whole, `times` times in total; with `each`, through each block by itself."""
    return Plan((Repeat(adjacent_blocks(blocks, "repeat"), whole_number(times, "`times`"), each),))


def replace(block: SupportsIndex, by: SupportsIndex) -> Plan:
    """Run the block `by` in the place of another block; `by` keeps its own place, so it runs twice."""
    return Plan((Replace(_block(block), _block(by)),))


def reverse(blocks: Blocks) -> Plan:
    """Reverse the order of a span."""
    return Plan((Reverse(adjacent_blocks(blocks, "reverse")),))


def reorder(order: str | Iterable[SupportsIndex | range | Visit]) -> Plan:
    """Set the whole order: block numbers, ranges or visits, or a route's text."""
    if isinstance(order, str):
        return Plan((Reorder(parse_items(order)),))
    items: list[RouteItem] = []
    for item in order if isinstance(order, Iterable) else [order]:
        if isinstance(item, Visit):
            items.append(RouteItem(item.block, dataclasses.replace(item, block=0)))
        else:
            items.extend(map(RouteItem, _refs([item], "reorder")))
    if not items:
        raise PlanError("reorder needs at least one block")
    return Plan((Reorder(tuple(items)),))


def skip_attention(*blocks: Blocks, mean: bool = False, start: SupportsIndex = 0) -> Plan:
    """Skip the attention of blocks, or their other token mixer; `mean` and `start` as for `drop`."""
    return Plan((Skip("attention", _refs(blocks, "skip_attention"), mean, whole_number(start, "`start`")),))


def skip_mlp(*blocks: Blocks, mean: bool = False, start: SupportsIndex = 0) -> Plan:
    """Skip the MLP of blocks; `mean` and `start` as for `drop`."""
    return Plan((Skip("mlp", _refs(blocks, "skip_mlp"), mean, whole_number(start, "`start`")),))


def scale(blocks: Blocks, by: float, *, branch: Branch | None = None, start: SupportsIndex = 0) -> Plan:
    """Multiply what blocks add to the stream: "attention", "mlp", or both by default; `start` as for `drop`."""
    if branch not in (None, "attention", "mlp"):
        raise PlanError(f"branch is 'attention' or 'mlp', not {branch!r}")
    return Plan((Scale(_refs([blocks], "scale"), by, branch, whole_number(start, "`start`")),))


def heads_off(blocks: Blocks, heads: SupportsIndex | Iterable[SupportsIndex]) -> Plan:
    """Set the output of attention heads of blocks to zero; heads are query heads, numbered from 0."""
    return Plan((UnitsOff("attention", _units(heads, "heads"), _refs([blocks], "heads_off")),))


def neurons_off(blocks: Blocks, neurons: SupportsIndex | Iterable[SupportsIndex]) -> Plan:
    """Set the activation of neurons of the MLP of blocks to zero; neurons are numbered from 0."""
    return Plan((UnitsOff("mlp", _units(neurons, "neurons"), _refs([blocks], "neurons_off")),))


def _units(units: Any, what: str) -> tuple[int, ...]:
    numbers = unit_numbers([units] if as_int(units) is not None else units, what)
    if not numbers:
        raise PlanError(f"{what}_off needs the number of at least one of the {what}")
    return numbers


def _block(value: object) -> int:
    return whole_number(value, "a block")


def _refs(blocks: Iterable[Any], what: str) -> tuple[Ref, ...]:
    """Return references to blocks, as they are written in an edit's text."""
    refs: list[Ref] = []
    for item in blocks:
        if isinstance(item, range):
            refs.extend([_span(item)] if item.step == 1 else item)
        elif (number := as_int(item)) is not None:
            refs.append(number)
        elif (
            isinstance(item, Iterable)
            and not isinstance(item, str | bytes | Mapping | Visit)
            and getattr(item, "ndim", True)
        ):
            refs.extend(_refs(item, what))
        else:
            raise PlanError(f"blocks are given as a number, a range or a list of these, not as {item!r}")
    if not refs:
        raise PlanError(f"{what} needs at least one block")
    return tuple(refs)


def adjacent_blocks(blocks: Blocks, what: str) -> Ref:
    """Return the reference to one block or to adjacent blocks."""
    refs = _refs([blocks], what)
    if len(refs) == 1:
        return refs[0]
    first = refs[0]
    if isinstance(first, int) and refs == tuple(range(first, first + len(refs))):
        return _span(range(first, first + len(refs)))
    raise PlanError(f"{blocks!r} is not a range of adjacent blocks; use range(8, 16) for blocks 8 to 15")


def _span(blocks: range) -> Ref:
    if not blocks:
        raise PlanError(f"{blocks!r} is empty; use range(8, 16) for blocks 8 to 15")
    # range(-4, 0) is the last four blocks; as a slice that end is open.
    return Span(blocks.start, None if blocks.stop == 0 else blocks.stop)
