"""The edits: small frozen values, each a function from route to route.

An edit names blocks of the loaded model and not positions: 7 is block 7 wherever it now stands. Edits hold their blocks as
written; negative numbers and open ranges are resolved when the edit meets a depth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import PlanError
from .route import Ref, Route, RouteItem, Visit, resolve

Branch = Literal["attention", "mlp"]


class Edit(ABC):
    """One change of a route. `str(edit)` is its text form, which `Plan.parse` reads back."""

    __slots__ = ()

    @abstractmethod
    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        """The new route; `apply` has the checks that all edits share."""

    @abstractmethod
    def __str__(self) -> str: ...

    def apply(self, route: Route, depth: int) -> Route:
        """Edit `route`, a route through a model of `depth` blocks.

        Raises:
            PlanError: a block out of range or no longer there, a place that is not unique, or an edit without effect.
        """
        edited = Route(self._edited(route, depth))
        if edited == route:
            raise PlanError(f"'{self}' would change nothing; leave it out")
        return edited


@dataclass(frozen=True, slots=True)
class Swap(Edit):
    """Exchange the places of two blocks."""

    first: int
    second: int

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise PlanError(f"block {self.first} cannot be swapped with itself; name two blocks")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        (first,), (second,) = resolve(self.first, depth), resolve(self.second, depth)
        if first == second:
            raise PlanError(
                f"blocks {self.first} and {self.second} are the same block of {depth}; name two different blocks"
            )
        here, there = _only_position(route, first, self), _only_position(route, second, self)
        visits = list(route)
        visits[here], visits[there] = visits[there], visits[here]
        return visits

    def __str__(self) -> str:
        return f"swap {self.first} {self.second}"


@dataclass(frozen=True, slots=True)
class Drop(Edit):
    """Take blocks out, wherever and however often they stand."""

    blocks: tuple[Ref, ...]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        gone = _named(self.blocks, depth)
        for block in gone:
            _positions(route, block, self)
        return (visit for visit in route if visit.block not in gone)

    def __str__(self) -> str:
        return f"drop {_words(self.blocks)}"


@dataclass(frozen=True, slots=True)
class Move(Edit):
    """Take a block, or blocks that stand together, out and put them back right after or right before another block."""

    blocks: Ref
    after: int | None = None
    before: int | None = None

    def __post_init__(self) -> None:
        if (self.after is None) == (self.before is None):
            raise PlanError("move needs either after= or before=, one of the two")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        moved = resolve(self.blocks, depth)
        target = self.before if self.after is None else self.after
        assert target is not None
        (anchor,) = resolve(target, depth)
        if anchor in moved:
            raise PlanError(f"'{self}': a block cannot be moved next to itself; name another block to put it by")
        segment = _segment(route, moved, self)
        taken = route[segment.start : segment.stop]
        rest = [*route[: segment.start], *route[segment.stop :]]
        place = _only_position(rest, anchor, self) + (self.after is not None)
        return [*rest[:place], *taken, *rest[place:]]

    def __str__(self) -> str:
        where = f"before {self.before}" if self.after is None else f"after {self.after}"
        return f"move {self.blocks} {where}"


@dataclass(frozen=True, slots=True)
class Repeat(Edit):
    """Let the stream pass several times in all through a block or a span as a whole: 8 9 becomes 8 9 8 9."""

    blocks: Ref
    times: int = 2

    def __post_init__(self) -> None:
        if self.times < 2:
            raise PlanError(f"repeat counts all passes, so times must be at least 2, not {self.times}")

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        segment = _segment(route, resolve(self.blocks, depth), self)
        return [*route[: segment.start], *(route[segment.start : segment.stop] * self.times), *route[segment.stop :]]

    def __str__(self) -> str:
        return f"repeat {self.blocks}" + (f" x{self.times}" if self.times != 2 else "")


@dataclass(frozen=True, slots=True)
class Reverse(Edit):
    """Turn the order of a span around."""

    blocks: Ref

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        segment = _segment(route, resolve(self.blocks, depth), self)
        return [*route[: segment.start], *route[segment.start : segment.stop][::-1], *route[segment.stop :]]

    def __str__(self) -> str:
        return f"reverse {self.blocks}"


@dataclass(frozen=True, slots=True)
class Reorder(Edit):
    """Write the whole order anew, with omissions and repeats; branches skipped before stay skipped."""

    order: tuple[RouteItem, ...]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        now = {visit.block: visit for visit in route}
        for item in self.order:
            for wanted in item.visits(depth):
                _positions(route, wanted.block, self)
                was = now[wanted.block]
                yield Visit(wanted.block, wanted.attention and was.attention, wanted.mlp and was.mlp)

    def __str__(self) -> str:
        return f"reorder {_words(self.order)}"


@dataclass(frozen=True, slots=True)
class Skip(Edit):
    """Leave out the attention (whatever mixes tokens) or the MLP of blocks, wherever they stand."""

    branch: Branch
    blocks: tuple[Ref, ...]

    def _edited(self, route: Route, depth: int) -> Iterable[Visit]:
        named = _named(self.blocks, depth)
        for block in named:
            if any(not getattr(route[place], self.branch) for place in _positions(route, block, self)):
                raise PlanError(f"'{self}': the {self.branch} of block {block} is already skipped; name it once")
        return (replace(visit, **{self.branch: False}) if visit.block in named else visit for visit in route)

    def __str__(self) -> str:
        return f"skip-{self.branch} {_words(self.blocks)}"


def _words(items: Iterable[object]) -> str:
    return " ".join(map(str, items))


def _named(refs: Sequence[Ref], depth: int) -> frozenset[int]:
    return frozenset(block for ref in refs for block in resolve(ref, depth))


def _positions(route: Sequence[Visit], block: int, edit: Edit) -> list[int]:
    places = [place for place, visit in enumerate(route) if visit.block == block]
    if not places:
        raise PlanError(f"'{edit}': block {block} is no longer there, an earlier edit took it out")
    return places


def _only_position(route: Sequence[Visit], block: int, edit: Edit) -> int:
    places = _positions(route, block, edit)
    if len(places) > 1:
        raise PlanError(
            f"'{edit}' needs one place, and block {block} stands in {len(places)} since a repeat; "
            "put this edit before the repeat, or write the order with reorder"
        )
    return places[0]


def _segment(route: Route, blocks: Sequence[int], edit: Edit) -> range:
    places = sorted(_only_position(route, block, edit) for block in blocks)
    if places[-1] - places[0] != len(places) - 1:
        raise PlanError(
            f"'{edit}' needs blocks that stand together, and an earlier edit set {blocks[0]} to {blocks[-1]} apart "
            f"(the route is now {route})"
        )
    return range(places[0], places[-1] + 1)
