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

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import PlanError
from .edits import Drop, Edit, Move, Reorder, Repeat, Reverse, Skip, Swap
from .route import Ref, Route, RouteItem, Span, Visit, parse_items

_SLUG_LIMIT = 80


@dataclass(frozen=True, slots=True)
class Plan:
    """A sequence of edits. Plans can be added, print as text, and give a `Route` once the depth is known."""

    edits: tuple[Edit, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan's text: edits separated by semicolons or line ends; `#` starts a comment.

        Raises:
            PlanError: an unknown edit (with the nearest known one) or arguments that cannot be read.
        """
        lines = (line.split("#", 1)[0] for line in text.splitlines())
        edits = [_parse_edit(part) for line in lines for part in line.split(";") if part.strip()]
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
        return route.canonical

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

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})" if self.edits else "Plan()"


def swap(first: int, second: int | None = None) -> Plan:
    """Exchange two blocks; with one number, that block and the next one."""
    if second is None:
        if first == -1:
            raise PlanError("block -1 is the last and has no next block to swap with; name both blocks")
        second = first + 1
    return Plan((Swap(first, second),))


def drop(*blocks: int | range) -> Plan:
    """Remove blocks from the model."""
    return Plan((Drop(_refs(blocks, "drop")),))


def move(blocks: int | range, *, after: int | None = None, before: int | None = None) -> Plan:
    """Move a block, or a span of adjacent blocks, to right after or right before another block."""
    return Plan((Move(_one_ref(blocks), after, before),))


def repeat(blocks: int | range, times: int = 2) -> Plan:
    """Pass through a block, or a span as a whole, `times` times in total."""
    return Plan((Repeat(_one_ref(blocks), times),))


def reverse(blocks: range) -> Plan:
    """Reverse the order of a span."""
    return Plan((Reverse(_one_ref(blocks)),))


def reorder(order: str | Iterable[int | range | Visit]) -> Plan:
    """Set the whole order: block numbers, ranges or visits, or a route's text."""
    if isinstance(order, str):
        return Plan((Reorder(parse_items(order)),))
    items = [
        RouteItem(item.block, item.attention, item.mlp) if isinstance(item, Visit) else RouteItem(ref)
        for item in order
        for ref in ([0] if isinstance(item, Visit) else _refs([item], "reorder"))
    ]
    if not items:
        raise PlanError("reorder needs at least one block")
    return Plan((Reorder(tuple(items)),))


def skip_attention(*blocks: int | range) -> Plan:
    """Skip the attention of blocks, or their other token mixer."""
    return Plan((Skip("attention", _refs(blocks, "skip_attention")),))


def skip_mlp(*blocks: int | range) -> Plan:
    """Skip the MLP of blocks."""
    return Plan((Skip("mlp", _refs(blocks, "skip_mlp")),))


def _refs(blocks: Iterable[int | range], what: str) -> tuple[Ref, ...]:
    refs: list[Ref] = []
    for item in blocks:
        refs.extend(item if isinstance(item, range) and item.step != 1 else [_one_ref(item)])
    if not refs:
        raise PlanError(f"{what} needs at least one block")
    return tuple(refs)


def _one_ref(blocks: int | range) -> Ref:
    if isinstance(blocks, bool) or not isinstance(blocks, int | range):
        raise PlanError(f"blocks are given as a number or a range, not as {blocks!r}")
    if isinstance(blocks, int):
        return blocks
    if blocks.step != 1 or not blocks:
        raise PlanError(f"{blocks!r} is not a range of adjacent blocks; use range(8, 16) for blocks 8 to 15")
    # range(-4, 0) is the last four blocks; as a slice that end is open.
    return Span(blocks.start, None if blocks.stop == 0 else blocks.stop)


def _plain_refs(text: str) -> tuple[Ref, ...]:
    items = parse_items(text)
    for item in items:
        if not (item.attention and item.mlp):
            raise PlanError(
                f"{item} has a suffix, which only routes take; name blocks only (skip-attention 5 is a separate edit)"
            )
    return tuple(item.ref for item in items)


def _exactly(count: int, text: str) -> tuple[Ref, ...]:
    refs = _plain_refs(text)
    if len(refs) != count:
        raise PlanError(f"expected {'one block or range' if count == 1 else f'{count} blocks'}, found {len(refs)}")
    return refs


def _number(ref: Ref) -> int:
    if isinstance(ref, Span):
        raise PlanError(f"expected one block, found the range {ref}")
    return ref


def _parse_swap(text: str) -> Edit:
    if len(text.replace(",", " ").split()) == 1:
        return swap(_number(_exactly(1, text)[0])).edits[0]
    first, second = map(_number, _exactly(2, text))
    return Swap(first, second)


def _parse_move(text: str) -> Edit:
    match = re.fullmatch(r"(.+?)\s+(after|before)\s+(\S+)", text.strip())
    if match is None:
        raise PlanError("expected a block, 'after' or 'before', and another block")
    blocks, where, target = match.groups()
    return Move(_exactly(1, blocks)[0], **{where: _number(_exactly(1, target)[0])})


def _parse_repeat(text: str) -> Edit:
    match = re.fullmatch(r"(.+?)(?:\s+(?:x|times\s+)(\d{1,4}))?", text.strip())
    if match is None:
        raise PlanError("expected a block or a range")
    return Repeat(_exactly(1, match[1])[0], int(match[2] or 2))


_GRAMMAR: dict[str, tuple[Callable[[str], Edit], str]] = {
    "swap": (_parse_swap, "swap 12 13"),
    "drop": (lambda text: Drop(_plain_refs(text)), "drop 20, drop 20 21 or drop 20:24"),
    "move": (_parse_move, "move 5 after 9 or move 5 before 2"),
    "repeat": (_parse_repeat, "repeat 8:16 or repeat 8 x3"),
    "reverse": (lambda text: Reverse(_exactly(1, text)[0]), "reverse 8:16"),
    "reorder": (lambda text: Reorder(parse_items(text)), "reorder 0:12 13 12 14:32"),
    "skip-attention": (lambda text: Skip("attention", _plain_refs(text)), "skip-attention 5"),
    "skip-mlp": (lambda text: Skip("mlp", _plain_refs(text)), "skip-mlp 5"),
}
_SHORT = {"skip-attn": "skip-attention"}


def _parse_edit(text: str) -> Edit:
    verb, _, rest = text.strip().partition(" ")
    name = verb.lower().replace("_", "-")
    name = _SHORT.get(name, name)
    if name not in _GRAMMAR:
        near = difflib.get_close_matches(name, _GRAMMAR, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the edits are {', '.join(_GRAMMAR)}."
        raise PlanError(f"unknown edit {verb!r} in {text.strip()!r}; {hint}")
    parse, example = _GRAMMAR[name]
    if not rest.strip():
        raise PlanError(f"{text.strip()!r} names no block; write it as {example}")
    try:
        return parse(rest)
    except PlanError as error:
        raise PlanError(f"in {text.strip()!r}: {error}. It is written as {example}") from None
