"""The edits of whole blocks: their order, copies, blocks of another checkpoint, and parallel blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import PlanError
from .edits import Edit, changed, check_ending, ending, join, parse_refs, positions, resolve_all, split_ending
from .route import Ref, Route, RouteItem, Span, parse_items, resolve
from .visit import BRANCHES, Visit, source_name


@dataclass(frozen=True, slots=True)
class Swap(Edit):
    """Exchange the positions of two blocks."""

    first: int
    second: int
    examples: ClassVar = {"swap": "swap 12 13"}

    @classmethod
    def with_next(cls, first: int) -> Swap:
        """Make the swap of a block with the next one."""
        if first == -1:
            raise PlanError("block -1 is the last and has no next block to swap with; name both blocks")
        return cls(first, first + 1)

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        refs = parse_refs(text)
        if len(refs) == 1:
            return cls.with_next(_number(refs[0]))
        first, second = map(_number, _exactly(2, refs))
        return cls(first, second)

    @property
    def _first(self) -> Ref:
        return self.first

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise PlanError(f"block {self.first} cannot be swapped with itself; name two blocks")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        if depth == self.second == self.first + 1:
            raise PlanError(
                f"block {depth} is out of range: the model has {depth} blocks, 0 to {self.first}, "
                f"so block {self.first} has no next block to swap with; name both blocks"
            )
        (first,), (second,) = resolve(self.first, depth), resolve(self.second, depth)
        if first == second:
            raise PlanError(
                f"blocks {self.first} and {self.second} are the same block of {depth}; name two different blocks"
            )
        i, j = _only_position(route, first, self), _only_position(route, second, self)
        visits = list(route)
        visits[i], visits[j] = visits[j], visits[i]
        return visits

    def __str__(self) -> str:
        return f"swap {self.first} {self.second}"


@dataclass(frozen=True, slots=True)
class Drop(Edit):
    """Remove blocks, at all their positions.

    With `mean`, they add the mean of what they add over tokens. With `start`, they run for so many first tokens.
    """

    blocks: tuple[Ref, ...]
    mean: bool = False
    start: int = 0
    examples: ClassVar = {"drop": "drop 20, drop 20 21, drop 20:24, drop 20 mean or drop 20 from 1"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        blocks, mean, start = split_ending(text)
        return cls(parse_refs(blocks), mean, start)

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def __post_init__(self) -> None:
        check_ending(self.mean, self.start)

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        removed = resolve_all(self.blocks, depth)
        for block in removed:
            positions(route, block, self)
        if not self.mean and not self.start:
            return (visit for visit in route if visit.block not in removed)
        like = Visit(0, False, False, mean=BRANCHES if self.mean else (), start=self.start)
        return (
            changed(visit, replace(like, block=visit.block)) if visit.block in removed else visit for visit in route
        )

    def __str__(self) -> str:
        return f"drop {join(self.blocks)}{ending(self.mean, self.start)}"


@dataclass(frozen=True, slots=True)
class _Placed(Edit):
    """Place a block, or adjacent blocks, right after or right before another block."""

    blocks: Ref
    after: int | None = None
    before: int | None = None

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        match = re.fullmatch(r"(.+?)\s+(after|before)\s+(\S+)", text.strip())
        if match is None:
            raise PlanError("expected a block, 'after' or 'before', and another block")
        blocks, where, target = match.groups()
        return cls(_parse_ref(blocks), **{where: _number(_parse_ref(target))})

    @property
    def _first(self) -> Ref:
        return self.blocks

    @property
    def _verb(self) -> str:
        return next(iter(self.examples))

    @property
    def _target(self) -> int:
        target = self.before if self.after is None else self.after
        assert target is not None
        return target

    def __post_init__(self) -> None:
        if (self.after is None) == (self.before is None):
            raise PlanError(f"{self._verb} needs exactly one of `after` and `before`")

    def _place(self, route: Sequence[Visit], depth: int) -> int:
        """Return the position in a route at which the blocks are placed."""
        (anchor,) = resolve(self._target, depth)
        return _only_position(route, anchor, self) + (self.after is not None)

    def __str__(self) -> str:
        return f"{self._verb} {self.blocks} {'before' if self.after is None else 'after'} {self._target}"


@dataclass(frozen=True, slots=True)
class Move(_Placed):
    """Move a block, or adjacent blocks, to right after or right before another block."""

    examples: ClassVar = {"move": "move 5 after 9 or move 5 before 2"}

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        moved = resolve(self.blocks, depth)
        if resolve(self._target, depth)[0] in moved:
            raise PlanError(f"'{self}': a block cannot be moved next to itself; name another block as the target")
        segment = _segment(route, moved, self)
        visits = route[segment.start : segment.stop]
        rest = [*route[: segment.start], *route[segment.stop :]]
        position = self._place(rest, depth)
        return [*rest[:position], *visits, *rest[position:]]


@dataclass(frozen=True, slots=True)
class Repeat(Edit):
    """Pass the stream through a block, or a span as a whole, `times` times in total: 8 9 becomes 8 9 8 9.

    With `each`, every block of the span is repeated by itself: 8 9 becomes 8 8 9 9.
    """

    blocks: Ref
    times: int = 2
    each: bool = False
    examples: ClassVar = {"repeat": "repeat 8:16, repeat 8 x3 or repeat 8:16 each"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        match = re.fullmatch(r"(.+?)(\s+each)?(?:\s+(?:x|times\s+)(\d{1,4}))?", text.strip())
        if match is None:
            raise PlanError("expected a block or a range")
        return cls(_parse_ref(match[1]), int(match[3] or 2), each=match[2] is not None)

    @property
    def _first(self) -> Ref:
        return self.blocks

    def __post_init__(self) -> None:
        if self.times < 2:
            raise PlanError(f"repeat counts all passes, so times must be at least 2, not {self.times}")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        segment = _segment(route, resolve(self.blocks, depth), self)
        visits = route[segment.start : segment.stop]
        repeated = [visit for visit in visits for _ in range(self.times)] if self.each else visits * self.times
        return [*route[: segment.start], *repeated, *route[segment.stop :]]

    def __str__(self) -> str:
        each, times = " each" * self.each, f" x{self.times}" if self.times != 2 else ""
        return f"repeat {self.blocks}{each}{times}"


@dataclass(frozen=True, slots=True)
class Replace(Edit):
    """Run another block in the place of a block. The other block keeps its own place, so it runs twice."""

    replaced: int
    block: int
    examples: ClassVar = {"replace": "replace 5 9, which runs block 9 in the place of block 5"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        replaced, block = map(_number, _exactly(2, parse_refs(text)))
        return cls(replaced, block)

    @property
    def _first(self) -> Ref:
        return self.replaced

    def __post_init__(self) -> None:
        if self.replaced == self.block:
            raise PlanError(f"block {self.block} cannot replace itself; name two blocks")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        (replaced,), (block,) = resolve(self.replaced, depth), resolve(self.block, depth)
        if replaced == block:
            raise PlanError(
                f"blocks {self.replaced} and {self.block} are the same block of {depth}; name two different blocks"
            )
        position, visit = _only_position(route, replaced, self), _only_visit(route, block, self)
        return [*route[:position], visit, *route[position + 1 :]]

    def __str__(self) -> str:
        return f"replace {self.replaced} {self.block}"


@dataclass(frozen=True, slots=True)
class Reverse(Edit):
    """Reverse the order of a span."""

    blocks: Ref
    examples: ClassVar = {"reverse": "reverse 8:16"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        return cls(_parse_ref(text))

    @property
    def _first(self) -> Ref:
        return self.blocks

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        segment = _segment(route, resolve(self.blocks, depth), self)
        return [*route[: segment.start], *route[segment.start : segment.stop][::-1], *route[segment.stop :]]

    def __str__(self) -> str:
        return f"reverse {self.blocks}"


@dataclass(frozen=True, slots=True)
class Reorder(Edit):
    """Set the whole order, with omissions and repeats, and which blocks are parallel.

    What was changed in blocks before stays changed.
    """

    order: tuple[RouteItem, ...]
    examples: ClassVar = {"reorder": "reorder 0:12 13 12 14:32"}
    sets_groups: ClassVar = True

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        return cls(parse_items(text))

    @property
    def _first(self) -> Ref:
        return self.order[0].ref

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        for item in self.order:
            for visit in item.visits(depth):
                yield visit.within(_only_visit(route, visit.block, self))

    def __str__(self) -> str:
        return f"reorder {join(self.order)}"


@dataclass(frozen=True, slots=True)
class InsertCopy(_Placed):
    """Insert copies of a block, or of adjacent blocks, whose output projections are zero: they add nothing.

    The model computes the same, and is deeper: the copies can be trained.
    """

    examples: ClassVar = {"insert-copy": "insert-copy 8 after 8 or insert-copy 8:10 before 0"}

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        copies = [
            Visit(block, source=_only_visit(route, block, self).source, zeroed=True)
            for block in resolve(self.blocks, depth)
        ]
        position = self._place(route, depth)
        return [*route[:position], *copies, *route[position:]]


@dataclass(frozen=True, slots=True)
class Take(Edit):
    """Run blocks of another checkpoint in the place of those with the same numbers, at all their positions."""

    blocks: tuple[Ref, ...]
    source: str
    examples: ClassVar = {"take": "take 12 from base"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        blocks, of, source = text.strip().rpartition(" from ")
        if not of:
            raise PlanError("expected blocks, 'from' and the name of a source")
        return cls(parse_refs(blocks), source.strip())

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def __post_init__(self) -> None:
        source_name(self.source)

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        taken = resolve_all(self.blocks, depth)
        for block in taken:
            positions(route, block, self)
        return (
            changed(visit, Visit(visit.block, source=self.source)) if visit.block in taken else visit for visit in route
        )

    def __str__(self) -> str:
        return f"take {join(self.blocks)} from {self.source}"


@dataclass(frozen=True, slots=True)
class Parallel(Edit):
    """Give adjacent blocks the same stream, and sum what they add; with `average`, take the mean of what they add."""

    blocks: tuple[Ref, ...]
    average: bool = False
    examples: ClassVar = {"parallel": "parallel 12 13 or parallel 12:16", "average": "average 12:16"}
    sets_groups: ClassVar = True

    @classmethod
    def _parse(cls, verb: str, text: str, /) -> Edit:
        return cls(parse_refs(text), verb == "average")

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        named = sorted(resolve_all(self.blocks, depth))
        if len(named) < 2:
            raise PlanError(f"'{self}' names one block; name at least two")
        segment = _segment(route, named, self)
        beyond = route[segment.stop : segment.stop + 1]
        if any(visit.parallel for visit in (*route[segment.start : segment.stop], *beyond)):
            raise PlanError(f"'{self}': some of these blocks are parallel already; name all of them in one edit")
        together = (
            replace(visit, parallel=number > 0, divisor=visit.divisor * (len(named) if self.average else 1))
            for number, visit in enumerate(route[segment.start : segment.stop])
        )
        return [*route[: segment.start], *together, *route[segment.stop :]]

    def __str__(self) -> str:
        return f"{'average' if self.average else 'parallel'} {join(self.blocks)}"


def _parse_ref(text: str) -> Ref:
    """Read one block or range."""
    return _exactly(1, parse_refs(text))[0]


def _exactly(count: int, refs: tuple[Ref, ...]) -> tuple[Ref, ...]:
    if len(refs) != count:
        raise PlanError(f"expected {'one block or range' if count == 1 else f'{count} blocks'}, found {len(refs)}")
    return refs


def _number(ref: Ref) -> int:
    if isinstance(ref, Span):
        raise PlanError(f"expected one block, found the range {ref}")
    return ref


def _only_position(route: Sequence[Visit], block: int, edit: Edit) -> int:
    found = positions(route, block, edit)
    if len(found) > 1:
        raise PlanError(
            f"'{edit}' needs one position, and block {block} has {len(found)} after a repeat; "
            "put this edit before the repeat, or write the order with reorder"
        )
    return found[0]


def _only_visit(route: Sequence[Visit], block: int, edit: Edit) -> Visit:
    """Return the visit of a block with what earlier edits changed in it; zero copies count if there is no other.

    Raises:
        PlanError: the route does not visit it, or in ways that differ.
    """
    visits = [route[position] for position in positions(route, block, edit)]
    visits = [visit for visit in visits if not visit.zeroed] or visits
    if len({visit.alone for visit in visits}) > 1:
        raise PlanError(
            f"'{edit}': block {block} is in the route in ways that differ ({join(dict.fromkeys(visits))}), and which "
            "of them is meant is not known; put this edit first"
        )
    return visits[0]


def _segment(route: Route, blocks: Sequence[int], edit: Edit) -> range:
    positions = sorted(_only_position(route, block, edit) for block in blocks)
    if positions[-1] - positions[0] != len(positions) - 1:
        raise PlanError(
            f"'{edit}' needs adjacent blocks, and an earlier edit separated {blocks[0]} to {blocks[-1]} "
            f"(the route is now {route})"
        )
    return range(positions[0], positions[-1] + 1)
