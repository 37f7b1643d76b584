"""The edits: small frozen values, each a function from route to route.

An edit names blocks of the loaded model, not positions: 7 is block 7 wherever it is now. Edits keep their blocks as
written; negative numbers and open ranges are resolved when the edit is applied to a depth.

A class declares everything about its edit: how it changes a route, and how its text is written and read.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import PlanError
from .route import Ref, Route, RouteItem, Span, Visit, parse_items, resolve

VERBS: dict[str, type[Edit]] = {}
"""The class of each edit, by the first word of its text. A subclass of `Edit` adds its own words."""
_SHORT_VERBS = {"skip-attn": "skip-attention"}
# Words of other programs and papers, which an error translates. Their spelling resembles that of other edits.
_SYNONYMS = {
    **dict.fromkeys(("delete", "del", "remove", "rm", "prune", "cut", "omit", "exclude", "erase"), "drop"),
    **dict.fromkeys(("duplicate", "dup", "copy", "clone", "double", "loop"), "repeat"),
    **dict.fromkeys(("exchange", "switch", "transpose"), "swap"),
    **dict.fromkeys(("shift", "insert"), "move"),
    **dict.fromkeys(("flip", "invert", "mirror"), "reverse"),
    **dict.fromkeys(("substitute", "overwrite"), "replace"),
    **dict.fromkeys(("permute", "order", "rearrange", "shuffle", "sort", "keep"), "reorder"),
}


class Edit(ABC):
    """One change of a route. `str(edit)` is its text form, which `parse_edit` reads back.

    Attributes:
        examples: how its text is written, by its first word.
    """

    __slots__ = ()
    examples: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        VERBS.update(dict.fromkeys(cls.examples, cls))

    @classmethod
    @abstractmethod
    def _parse(cls, verb: str, text: str, /) -> Edit:
        """Read the edit's text after its first word.

        Raises:
            PlanError: the text cannot be read.
        """

    @property
    @abstractmethod
    def _first(self) -> Ref:
        """Return the block or range that the edit names first."""

    @abstractmethod
    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        """Return the new route. `apply` does the checks that all edits share."""

    @abstractmethod
    def __str__(self) -> str: ...

    def first_blocks(self, depth: int) -> tuple[int, ...]:
        """Return the block, or the blocks of the range, that the edit names first, in a model of `depth` blocks."""
        return resolve(self._first, depth)

    def apply(self, route: Route, depth: int) -> Route:
        """Edit `route`, a route through a model of `depth` blocks.

        Raises:
            PlanError: a block is out of range, was removed, or has several positions; or the edit has no effect.
        """
        edited = Route(self._edited(route, depth))
        if edited == route:
            raise PlanError(f"'{self}' would change nothing; remove it from the plan")
        return edited


def nearest_word(word: str, words: Iterable[str]) -> str | None:
    """Return the word that a user probably meant: the one with the same meaning, else one with a similar spelling."""
    words = list(words)
    if _SYNONYMS.get(word) in words:
        return _SYNONYMS[word]
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def parse_edit(text: str) -> Edit:
    """Read the text of one edit.

    Raises:
        PlanError: an unknown edit (with the nearest known one) or arguments that cannot be read.
    """
    word, _, rest = text.strip().partition(" ")
    verb = word.lower().replace("_", "-")
    verb = _SHORT_VERBS.get(verb, verb)
    if verb not in VERBS:
        near = nearest_word(verb, VERBS)
        hint = f"did you mean {near!r}?" if near else f"the edits are {', '.join(VERBS)}."
        raise PlanError(f"unknown edit {word!r} in {text.strip()!r}; {hint}")
    example = VERBS[verb].examples[verb]
    if not rest.strip():
        raise PlanError(f"{text.strip()!r} names no block; write it as {example}")
    try:
        return VERBS[verb]._parse(verb, rest)
    except PlanError as error:
        raise PlanError(f"in {text.strip()!r}: {error}. It is written as {example}") from None


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
    """Remove blocks, at all their positions."""

    blocks: tuple[Ref, ...]
    examples: ClassVar = {"drop": "drop 20, drop 20 21 or drop 20:24"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        return cls(parse_refs(text))

    @property
    def _first(self) -> Ref:
        return self.blocks[0]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        removed = resolve_all(self.blocks, depth)
        for block in removed:
            positions(route, block, self)
        return (visit for visit in route if visit.block not in removed)

    def __str__(self) -> str:
        return f"drop {join(self.blocks)}"


@dataclass(frozen=True, slots=True)
class Move(Edit):
    """Move a block, or adjacent blocks, to right after or right before another block."""

    blocks: Ref
    after: int | None = None
    before: int | None = None
    examples: ClassVar = {"move": "move 5 after 9 or move 5 before 2"}

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

    def __post_init__(self) -> None:
        if (self.after is None) == (self.before is None):
            raise PlanError("move needs exactly one of after= and before=")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        moved = resolve(self.blocks, depth)
        target = self.before if self.after is None else self.after
        assert target is not None
        (anchor,) = resolve(target, depth)
        if anchor in moved:
            raise PlanError(f"'{self}': a block cannot be moved next to itself; name another block as the target")
        segment = _segment(route, moved, self)
        visits = route[segment.start : segment.stop]
        rest = [*route[: segment.start], *route[segment.stop :]]
        position = _only_position(rest, anchor, self) + (self.after is not None)
        return [*rest[:position], *visits, *rest[position:]]

    def __str__(self) -> str:
        where = f"before {self.before}" if self.after is None else f"after {self.after}"
        return f"move {self.blocks} {where}"


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
        position, visit = _only_position(route, replaced, self), route[positions(route, block, self)[0]]
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
    """Set the whole order, with omissions and repeats. What was changed in blocks before stays changed."""

    order: tuple[RouteItem, ...]
    examples: ClassVar = {"reorder": "reorder 0:12 13 12 14:32"}

    @classmethod
    def _parse(cls, _verb: str, text: str, /) -> Edit:
        return cls(parse_items(text))

    @property
    def _first(self) -> Ref:
        return self.order[0].ref

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        current = {visit.block: visit for visit in route}
        for item in self.order:
            for visit in item.visits(depth):
                positions(route, visit.block, self)
                before = current[visit.block]
                yield Visit(
                    visit.block,
                    visit.attention * before.attention,
                    visit.mlp * before.mlp,
                    visit.heads_off + before.heads_off,
                    visit.neurons_off + before.neurons_off,
                )

    def __str__(self) -> str:
        return f"reorder {join(self.order)}"


def parse_refs(text: str) -> tuple[Ref, ...]:
    """Read blocks and ranges.

    Raises:
        PlanError: one of them cannot be read, or has a suffix.
    """
    items = parse_items(text)
    for item in items:
        if not item.like.whole:
            raise PlanError(
                f"{item} has a suffix, which only routes take; name blocks only (skip-attention 5 is a separate edit)"
            )
    return tuple(item.ref for item in items)


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


def join(items: Iterable[object]) -> str:
    """Return items as text, separated by spaces."""
    return " ".join(map(str, items))


def resolve_all(refs: Sequence[Ref], depth: int) -> frozenset[int]:
    """Return the blocks of several references."""
    return frozenset(block for ref in refs for block in resolve(ref, depth))


def positions(route: Sequence[Visit], block: int, edit: Edit) -> list[int]:
    """Return the positions of a block in a route.

    Raises:
        PlanError: it has none.
    """
    found = [position for position, visit in enumerate(route) if visit.block == block]
    if not found:
        raise PlanError(f"'{edit}': block {block} is not in the route any more: an earlier edit removed it")
    return found


def _only_position(route: Sequence[Visit], block: int, edit: Edit) -> int:
    found = positions(route, block, edit)
    if len(found) > 1:
        raise PlanError(
            f"'{edit}' needs one position, and block {block} has {len(found)} after a repeat; "
            "put this edit before the repeat, or write the order with reorder"
        )
    return found[0]


def _segment(route: Route, blocks: Sequence[int], edit: Edit) -> range:
    positions = sorted(_only_position(route, block, edit) for block in blocks)
    if positions[-1] - positions[0] != len(positions) - 1:
        raise PlanError(
            f"'{edit}' needs adjacent blocks, and an earlier edit separated {blocks[0]} to {blocks[-1]} "
            f"(the route is now {route})"
        )
    return range(positions[0], positions[-1] + 1)
