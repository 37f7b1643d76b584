"""A route: the order in which the residual stream visits the blocks of a loaded model.

A decoder-only transformer is a residual stream that passes through blocks. So every edit of whole layers, and every
change of what a layer's attention or MLP adds to the stream, is a different route through the same blocks. Routes are
plain values: two plans that give the same route are the same model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from ..errors import PlanError
from .html import route_html
from .visit import Visit, parse_suffix, whole_number

_ITEM = re.compile(
    r"^(-?\d{1,9})?(:)?(-?\d{1,9})?(?:@([A-Za-z]\w*))?((?:-(?:attn|attention|mlp))*)((?:\[[^\[\]]*\])*)$"
)


class Route(tuple[Visit, ...]):
    """The whole depth of an edited model: a tuple of `Visit`.

    >>> from layersurgery import Route
    >>> str(Route.parse("0:12 13 12 14:32"))
    '0:12 13 12 14:32'
    >>> Route.parse("0:3 4-attn 5:8").blocks
    (0, 1, 2, 4, 5, 6, 7)
    """

    __slots__ = ()

    def __new__(cls, visits: Iterable[Visit | int] = ()) -> Route:  # noqa: D102 - the class says it
        return super().__new__(cls, (v if isinstance(v, Visit) else Visit(v) for v in visits))

    @classmethod
    def identity(cls, depth: int) -> Route:
        """Return the route of the unedited model: every block once, in order."""
        return cls(range(depth))

    @classmethod
    def parse(cls, text: str, depth: int | None = None) -> Route:
        """Read the compact form: numbers and half-open ranges, with suffixes for what is changed.

        The suffixes are @base for a block of another checkpoint, -attn and -mlp for skipped branches, [attn*0.5] and
        [mlp*0.5] for scaled ones, [mlp=mean] for a mean, [from 1] for changes that leave the first token,
        [heads-off 0+3], [neurons-off 0:100], [zeroed], [parallel] for the input of the visit before, and [/2] for half
        of what the block adds.

        Negative numbers and open ends ("20:", "-4:") need `depth`.

        Raises:
            PlanError: an item cannot be read; names it.
        """
        return cls(visit for item in parse_items(text) for visit in item.visits(depth))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the visited blocks, in order, regardless of skipped branches."""
        return tuple(visit.block for visit in self)

    @property
    def canonical(self) -> Route:
        """Return the same model without visits that add nothing: a block with both branches skipped is dropped."""
        kept: list[Visit] = []
        for group in self.groups:
            adding = [visit for visit in group if not visit.adds_nothing]
            kept += (replace(visit, parallel=group[0].parallel or number > 0) for number, visit in enumerate(adding))
        return Route(kept)

    @property
    def groups(self) -> tuple[tuple[Visit, ...], ...]:
        """Return the visits in groups of those that are given the same stream; most groups have one visit."""
        groups: list[list[Visit]] = []
        for visit in self:
            if visit.parallel and groups:
                groups[-1].append(visit)
            else:
                groups.append([visit])
        return tuple(map(tuple, groups))

    def checked(self, depth: int) -> Route:
        """Return the canonical form of a route through a model of `depth` blocks.

        Raises:
            PlanError: it visits a block that the model does not have, begins with a parallel visit, or leaves no block.
        """
        if missing := sorted({visit.block for visit in self if visit.block >= depth}):
            raise PlanError(f"the route visits block {missing[0]}, and the model has {depth} blocks, 0 to {depth - 1}")
        if self and self[0].parallel:
            raise PlanError(
                f"the route begins with {self[0]}, which has no visit before it; write [parallel] at a later one"
            )
        if not self.canonical:
            raise PlanError("the route leaves no block; keep at least one")
        return self.canonical

    def is_identity(self, depth: int) -> bool:
        """Return whether this is the unedited model of `depth` blocks."""
        return self == Route.identity(depth)

    def _consecutive(self) -> Iterator[list[Visit]]:
        numbered = enumerate(self)
        for _, run in groupby(numbered, key=lambda item: (item[1].block - item[0], item[1].suffix)):
            yield [visit for _, visit in run]

    def __str__(self) -> str:
        words: list[str] = []
        for run in self._consecutive():
            if len(run) > 2:
                words.append(f"{run[0].block}:{run[-1].block + 1}{run[0].suffix}")
            else:
                words.extend(map(str, run))
        return " ".join(words)

    def _repr_html_(self) -> str:
        return route_html(self, lambda visits: str(Route(visits)))

    def __repr__(self) -> str:
        return f"Route.parse({str(self)!r})"

    # A sum of routes is a route; tuple's own `+` would lose the type.
    def __add__(self, other: object) -> Route:
        if not isinstance(other, tuple):
            return NotImplemented
        return Route((*self, *other))


_WHOLE = Visit(0)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of blocks, as a Python slice writes it: "8:16", "20:", "-4:"; None is an open end."""

    start: int | None
    stop: int | None

    def __str__(self) -> str:
        return ":".join("" if number is None else str(number) for number in (self.start, self.stop))


Ref = int | Span
"""A block or a range, before the depth is known. Negative numbers count from the end."""


@dataclass(frozen=True, slots=True)
class RouteItem:
    """Hold one word of a route's text, before the depth is known, with what it changes.

    Attributes:
        ref: the blocks.
        like: a visit whose changes those of the blocks are.
    """

    ref: Ref
    like: Visit = _WHOLE

    def visits(self, depth: int | None) -> Iterator[Visit]:
        """Yield the visits of this word in a model of `depth` blocks."""
        for block in resolve(self.ref, depth):
            yield replace(self.like, block=block)

    def __str__(self) -> str:
        return f"{self.ref}{self.like.suffix}"


def parse_items(text: str) -> tuple[RouteItem, ...]:
    """Split a route's text into words; commas count as spaces."""
    items = []
    for word in re.findall(r"(?:\[[^\[\]]*\]|[^\s,])+", text):
        match = _ITEM.match(word)
        if match is None or (match[1] is None and match[2] is None) or (match[2] is None and match[3] is not None):
            where = "" if word == text.strip() else f" in {text.strip()!r}"
            raise PlanError(
                f"cannot read {word!r}{where}: write block numbers (7), half-open ranges (8:16), and "
                "suffixes after a number: 5-attn and 5-mlp skip a branch, 5[mlp*0.5] scales it, 5@base is of a source"
            )
        start = None if match[1] is None else int(match[1])
        stop = None if match[3] is None else int(match[3])
        ref: Ref = Span(start, stop) if match[2] else start or 0
        items.append(RouteItem(ref, parse_suffix(match[4] or "", match[5], match[6])))
    if not items:
        raise PlanError("no block is named: write at least one, as in '0:12 13 12 14:32'")
    return tuple(items)


def resolve(ref: Ref, depth: int | None) -> tuple[int, ...]:
    """Return the block numbers of a reference in a model of `depth` blocks; never empty.

    Without a depth, only references that do not need one are resolved, and nothing is checked against it. Unlike a
    Python slice, a range that reaches outside the model is an error; it is not clipped.

    Raises:
        PlanError: out of range (gives the valid range), an empty range, or an unknown depth that is needed.
    """
    if not isinstance(ref, Span):
        ref = whole_number(ref, "a block")
    ends = (ref.start if ref.start is not None else 0, ref.stop) if isinstance(ref, Span) else (ref, None)
    if depth is None:
        if min(number for number in ends if number is not None) < 0 or (isinstance(ref, Span) and ref.stop is None):
            raise PlanError(f"{ref} counts from the end, so the depth must be known")
        return _between(ref, ref.start or 0, ref.stop or 0) if isinstance(ref, Span) else (ref,)
    known = f"the model has {depth} blocks, 0 to {depth - 1}"
    if isinstance(ref, int):
        if not -depth <= ref < depth:
            raise PlanError(f"block {ref} is out of range: {known} (or -{depth} to -1, counted from the end)")
        return (ref % depth,)
    first, last = ends[0], depth if ref.stop is None else ref.stop
    if not -depth <= first <= depth or not -depth <= last <= depth:
        raise PlanError(f"the range {ref} is out of range: {known}; ranges are half-open, so the widest is 0:{depth}")
    return _between(ref, first + depth * (first < 0), last + depth * (last < 0))


def _between(ref: Ref, first: int, last: int) -> tuple[int, ...]:
    if first >= last:
        raise PlanError(f"the range {ref} is empty: ranges are half-open, so 8:16 means blocks 8 to 15")
    return tuple(range(first, last))
