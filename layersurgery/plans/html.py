"""Show plans and routes in notebooks, as HTML."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any, Protocol


class _Visit(Protocol):
    @property
    def block(self) -> int: ...


_TAGS = {"moved": "b", "repeated": "i", "removed": "s", "": "span"}


def plan_html(edits: Iterable[str]) -> str:
    """Return the edits of a plan as a numbered list."""
    items = "".join(f"<li><code>{escape(edit)}</code></li>" for edit in edits)
    return f"<ol>{items}</ol>" if items else "<p>no edits</p>"


def route_html(route: Sequence[_Visit], as_text: Callable[[Iterable[Any]], str]) -> str:
    """Return a route as one line: moved blocks bold, repeated visits italic, removed blocks struck out.

    Blocks that are removed after the last one that is visited are not shown: a route has no depth.

    Args:
        route: the visits.
        as_text: writes visits, or numbers of blocks, as the text of a route.
    """
    groups = []
    for kind, parts in groupby(_parts(route, as_text), key=lambda part: part[0]):
        text = " ".join(text for _, text in parts)
        title = f' title="{kind}"' if kind else ""
        groups.append(f"<{_TAGS[kind]}{title}>{escape(text)}</{_TAGS[kind]}>")
    return f"<code>{' '.join(groups) or 'no blocks'}</code>"


def _parts(route: Sequence[_Visit], as_text: Callable[[Iterable[Any]], str]) -> Iterable[tuple[str, str]]:
    """Yield the words of a route, each with its kind (a key of `_TAGS`)."""
    blocks = [visit.block for visit in route]
    first_visits = {block: position for position, block in reversed(list(enumerate(blocks)))}
    positions = sorted(first_visits.values())
    in_order = {positions[index] for index in _increasing([blocks[position] for position in positions])}

    def kind(position: int) -> str:
        if position in in_order:
            return ""
        return "moved" if first_visits[blocks[position]] == position else "repeated"

    next_block = 0
    for name, group in groupby(range(len(route)), key=kind):
        chosen: list[_Visit] = []
        for position in group:
            if not name:
                removed = [block for block in range(next_block, blocks[position]) if block not in first_visits]
                next_block = blocks[position] + 1
                if removed:
                    if chosen:
                        yield name, as_text(chosen)
                    chosen = []
                    yield "removed", as_text(removed)
            chosen.append(route[position])
        if chosen:
            yield name, as_text(chosen)


def _increasing(numbers: Sequence[int]) -> list[int]:
    """Return the indices of a longest increasing subsequence of different numbers."""
    ends: list[int] = []  # the smallest last number of an increasing subsequence of each length
    lengths = []
    for number in numbers:
        length = bisect_left(ends, number)
        ends[length : length + 1] = [number]
        lengths.append(length)
    chosen: list[int] = []
    for index in range(len(numbers) - 1, -1, -1):
        if lengths[index] == len(ends) - 1 - len(chosen):
            chosen.append(index)
    return chosen[::-1]
