"""A route: the order in which the residual stream visits the blocks of a loaded model.

A decoder-only transformer is a residual stream that passes through blocks. So every edit of whole layers, and every
change of what a layer's attention or MLP adds to the stream, is a different route through the same blocks. Routes are
plain values: two plans that give the same route are the same model.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from ..errors import PlanError
from .html import route_html

Branch = Literal["attention", "mlp"]

_ITEM = re.compile(r"^(-?\d{1,9})?(:)?(-?\d{1,9})?((?:-(?:attn|attention|mlp))*)((?:\[[^\[\]]*\])*)$")


def as_int(value: object) -> int | None:
    """Return an integer of any library as int; None for everything else, also for True and False."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def whole_number(value: object, what: str) -> int:
    """Return an integer of any library as int.

    Raises:
        PlanError: it is not an integer; `what` begins the sentence.
    """
    number = as_int(value)
    if number is None:
        raise PlanError(f"{what} is given as a whole number, not as {value!r}")
    return number


@dataclass(frozen=True, slots=True, order=True)
class Visit:
    """One pass of the residual stream through one block.

    Attributes:
        block: number of the block in the loaded model, from 0.
        attention: factor of what the block's attention (or its other token mixer) adds to the stream: True for 1, False
            for 0, which skips it.
        mlp: factor of what the block's MLP adds to the stream.
        heads_off: numbers of the attention heads whose output is zero.
        neurons_off: numbers of the neurons of the MLP whose activation is zero.
    """

    block: int
    attention: bool | float = True
    mlp: bool | float = True
    heads_off: tuple[int, ...] = ()
    neurons_off: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", whole_number(self.block, "a block"))
        if self.block < 0:
            raise PlanError(
                f"a visit needs a block number of at least 0, not {self.block}; resolve it against the depth first"
            )
        for branch, units in (("attention", "heads_off"), ("mlp", "neurons_off")):
            factor = branch_factor(getattr(self, branch), branch)
            object.__setattr__(self, branch, factor)
            # What is off in a branch that is skipped makes no difference: such visits are the same.
            numbers = unit_numbers(getattr(self, units), units) if factor else ()
            object.__setattr__(self, units, numbers)

    @property
    def whole(self) -> bool:
        """Return whether the block runs as it is."""
        return self.attention is True and self.mlp is True and not self.heads_off and not self.neurons_off

    @property
    def skipped(self) -> Branch | None:
        """Return the branch that is skipped; None if both run."""
        return "attention" if not self.attention else "mlp" if not self.mlp else None

    @property
    def skips_only(self) -> bool:
        """Return whether branches are skipped or run as they are: nothing is scaled, and no head or neuron is off."""
        return isinstance(self.attention, bool) and isinstance(self.mlp, bool) and not self.heads_off + self.neurons_off

    def factor(self, branch: Branch) -> bool | float:
        """Return the factor of what a branch adds to the stream."""
        return self.attention if branch == "attention" else self.mlp

    def units_off(self, branch: Branch) -> tuple[int, ...]:
        """Return the heads, or the neurons, of a branch that are off."""
        return self.heads_off if branch == "attention" else self.neurons_off

    @property
    def suffix(self) -> str:
        """Return what the text of the visit has behind the block, such as "", "-attn" or "[mlp*0.5]"."""
        factors = {"attn": self.attention, "mlp": self.mlp}
        skipped = "".join(f"-{name}" for name, factor in factors.items() if not factor)
        scaled = "".join(
            f"[{name}*{factor_text(factor)}]" for name, factor in factors.items() if factor and factor is not True
        )
        off = {"heads-off": self.heads_off, "neurons-off": self.neurons_off}
        return skipped + scaled + "".join(f"[{name} {units_text(units)}]" for name, units in off.items() if units)

    def __str__(self) -> str:
        return f"{self.block}{self.suffix}"


def branch_factor(value: object, what: str) -> bool | float:
    """Return a factor of a branch as a number; True for 1 and False for 0.

    Raises:
        PlanError: it is not a finite number; `what` begins the sentence.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"{what} is scaled by a finite number, not by {value!r}")
    return bool(number) if number in (0, 1) else number


def factor_text(factor: float) -> str:
    """Return the shortest text of a factor that is read back as the same number."""
    return repr(float(factor)).removesuffix(".0")


def unit_numbers(values: Iterable[object], what: str) -> tuple[int, ...]:
    """Return numbers of heads or neurons, each once and in order.

    Raises:
        PlanError: one of them is not a whole number, or is negative.
    """
    numbers = sorted({whole_number(value, f"a number of {what}") for value in values})
    if numbers and numbers[0] < 0:
        raise PlanError(f"{what} are numbered from 0, not {numbers[0]}")
    return tuple(numbers)


def units_text(units: Sequence[int], separator: str = "+") -> str:
    """Return numbers as text: numbers and half-open ranges.

    >>> from layersurgery.plans.route import units_text
    >>> units_text((0, 1, 2, 3, 7))
    '0:4+7'
    """
    words: list[str] = []
    for _, run in groupby(enumerate(units), key=lambda item: item[1] - item[0]):
        numbers = [number for _, number in run]
        words += [f"{numbers[0]}:{numbers[-1] + 1}"] if len(numbers) > 2 else map(str, numbers)
    return separator.join(words)


def parse_units(text: str) -> tuple[int, ...]:
    """Read numbers and half-open ranges of heads or neurons, separated by +, spaces or commas.

    Raises:
        PlanError: a word is neither, or a range is empty.
    """
    numbers: list[int] = []
    for word in re.split(r"[+,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", word)
        if match is None:
            raise PlanError(f"cannot read {word!r}: give numbers (3) or half-open ranges (0:4), counted from 0")
        first, stop = int(match[1]), int(match[2] or int(match[1]) + 1)
        if first >= stop:
            raise PlanError(f"the range {word} is empty: ranges are half-open, so 0:4 means 0 to 3")
        numbers += range(first, stop)
    return tuple(sorted(set(numbers)))


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

        The suffixes are -attn and -mlp for skipped branches, [attn*0.5] and [mlp*0.5] for scaled ones, [heads-off 0+3]
        and [neurons-off 0:100].

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
        return Route(visit for visit in self if visit.attention or visit.mlp)

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
    like: Visit = Visit(0)

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
            raise PlanError(
                f"cannot read {word!r} in {text.strip()!r}: write block numbers (7), half-open ranges (8:16), and "
                "-attn or -mlp after a number to skip a branch (5-attn), or [mlp*0.5] to scale it"
            )
        start = None if match[1] is None else int(match[1])
        stop = None if match[3] is None else int(match[3])
        ref: Ref = Span(start, stop) if match[2] else start or 0
        items.append(RouteItem(ref, Visit(0, **_parse_changes(match[4], match[5]))))
    if not items:
        raise PlanError("no block is named: write at least one, as in '0:12 13 12 14:32'")
    return tuple(items)


def _parse_changes(skips: str, brackets: str) -> dict[str, Any]:
    """Return the fields of a visit from its suffixes."""
    fields: dict[str, Any] = {}
    if "-att" in skips:
        fields["attention"] = False
    if "-mlp" in skips:
        fields["mlp"] = False
    for text in re.findall(r"\[(.*?)\]", brackets):
        if match := re.fullmatch(r"\s*(attn|attention|mlp)\s*\*\s*(\S+)\s*", text):
            name = "mlp" if match[1] == "mlp" else "attention"
            value: Any = branch_factor(match[2], f"[{text}]")
        elif match := re.fullmatch(r"\s*(heads|neurons)-off\s+(.+)", text):
            name, value = f"{match[1]}_off", parse_units(match[2])
        else:
            raise PlanError(f"cannot read [{text}]: write [attn*0.5], [mlp*0.5], [heads-off 0+3] or [neurons-off 0:9]")
        if name in fields:
            raise PlanError(f"[{text}]: {name} is given twice")
        fields[name] = value
    return fields


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
