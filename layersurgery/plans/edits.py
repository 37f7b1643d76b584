"""What all edits have in common: an edit is a small frozen value, a function from route to route.

An edit names blocks of the loaded model, not positions: 7 is block 7 wherever it is now. Edits keep their blocks as
written; negative numbers and open ranges are resolved when the edit is applied to a depth.

A class declares everything about its edit: how it changes a route, and how its text is written and read.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from ..errors import PlanError
from .route import Ref, Route, parse_items, resolve
from .visit import Visit, whole_number

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
        sets_groups: whether it may change which blocks are parallel.
    """

    __slots__ = ()
    examples: ClassVar[Mapping[str, str]] = {}
    sets_groups: ClassVar[bool] = False

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
            PlanError: a block is out of range, was removed, or has several positions; the edit has no effect, or
                separates parallel blocks.
        """
        edited = Route(self._edited(route, depth))
        if edited == route:
            raise PlanError(f"'{self}' would change nothing; remove it from the plan")
        if not self.sets_groups:
            before, after = _parallel_blocks(route), _parallel_blocks(edited)
            lost = {group for group in before - after if not set(group).isdisjoint(edited.blocks)}
            if broken := lost or after - before:
                raise PlanError(
                    f"'{self}' would separate or join parallel blocks ({join(min(broken))}); put this edit before the "
                    "one that makes them parallel"
                )
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


def split_ending(text: str) -> tuple[str, bool, int]:
    """Split "20 mean" or "20 from 1" into the blocks, whether a mean is added, and the first token that is changed."""
    match = re.fullmatch(r"(.*?)(\s+mean)?(?:\s+from\s+(\d{1,9}))?", text.strip(), re.DOTALL)
    assert match is not None
    if match[3] is not None and int(match[3]) == 0:
        raise PlanError("'from 0' is all tokens, which is what the edit does without it; leave it out")
    return match[1], match[2] is not None, int(match[3] or 0)


def check_ending(mean: bool, start: int) -> None:
    """Refuse a mean and a first token that cannot be combined, or are no such values."""
    if whole_number(start, "the first token that an edit changes") < 0:
        raise PlanError(f"the first token that an edit changes is counted from 0, not {start}")
    if mean and start:
        raise PlanError("'mean' and 'from' cannot be combined; choose one")


def ending(mean: bool, start: int) -> str:
    """Return the text behind the blocks of an edit that adds a mean, or leaves the first tokens."""
    return " mean" * mean + f" from {start}" * bool(start)


def changed(visit: Visit, like: Visit) -> Visit:
    """Return a visit with the changes of another one too; its place among parallel blocks stays."""
    return replace(like.within(visit), parallel=visit.parallel, divisor=visit.divisor)


def _parallel_blocks(route: Route) -> set[tuple[int, ...]]:
    """Return the numbers of the blocks of each group of parallel blocks."""
    return {tuple(visit.block for visit in group) for group in route.groups if len(group) > 1}


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
