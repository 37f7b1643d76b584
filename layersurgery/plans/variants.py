"""The sets of edited models that a sweep measures: every swap, every drop, every skip, or plans of one's own.

>>> [variant.plan for variant in family("swap", 4)]
['swap 0 1', 'swap 1 2', 'swap 2 3']
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..errors import PlanError
from .edits import Drop, Edit, Move, Reorder, Repeat, Reverse, Skip, Swap
from .plan import Plan, reorder
from .route import Ref, Route, Span, resolve

FAMILIES = {
    "swap": "swap every two neighbouring blocks",
    "drop": "drop every block",
    "skip-attention": "skip the attention of every block",
    "skip-mlp": "skip the MLP of every block",
    "drop-span": "drop every N neighbouring blocks; written drop-span:N",
    "swap-pairs": "swap every two blocks",
}
_NAMED = re.compile(r"([\w.+-]+)\s*:\s+(.*)")


@dataclass(frozen=True, slots=True)
class Variant:
    """One edited model of a sweep.

    Attributes:
        edit: the family it is of, "plan" for a plan of one's own, or "none".
        plan: the plan's text; empty for the unedited model.
        route: what the model becomes.
        layer: the first block that the plan names; None for the unedited model.
        name: what the caller calls it; the plan's text otherwise.
    """

    edit: str
    plan: str
    route: Route
    layer: int | None
    name: str = ""

    @classmethod
    def of(cls, edit: str, plan: Plan, depth: int, name: str = "") -> Variant:
        """The variant that a plan makes of a model of `depth` blocks.

        Raises:
            PlanError: the plan does not fit, or is empty.
        """
        if not plan.edits:
            raise PlanError("an empty plan is the unedited model, which is measured in any case; leave it out")
        return cls(edit, str(plan), plan.route(depth), _first_block(plan.edits[0], depth), name or str(plan))


def unedited(depth: int) -> Variant:
    """The model as it is."""
    return Variant("none", "", Route.identity(depth), None, "unedited")


def family(name: str, depth: int, layers: range | None = None) -> list[Variant]:
    """All edits of one kind that leave a model of `depth` blocks at least one, in the order of their first block.

    Args:
        name: one of `FAMILIES`; drop-span with the length of the span, "drop-span:4".
        depth: number of blocks.
        layers: only edits that touch none but these blocks.

    Raises:
        PlanError: an unknown family, with the nearest known one, or a span that is too long.
    """
    kind, span = _parse(name)
    blocks = range(depth) if layers is None else layers
    if not set(blocks) <= set(range(depth)):
        raise PlanError(
            f"layers {blocks.start}:{blocks.stop} are out of range: the model has {depth} blocks, 0 to {depth - 1}"
        )
    if span >= depth:
        raise PlanError(f"{name}: a model of {depth} blocks has no {span} to drop and one to keep")
    edits: Iterable[Edit]
    match kind:
        case "swap":
            edits = (Swap(block, block + 1) for block in blocks[:-1])
        case "drop":
            edits = (Drop((block,)) for block in blocks if depth > 1)
        case "skip-attention":
            edits = (Skip("attention", (block,)) for block in blocks)
        case "skip-mlp":
            edits = (Skip("mlp", (block,)) for block in blocks)
        case "drop-span":
            edits = (Drop((Span(start, start + span),)) for start in blocks[: len(blocks) - span + 1])
        case _:
            edits = (Swap(*pair) for pair in combinations(blocks, 2))
    return [Variant.of(kind, Plan((edit,)), depth) for edit in edits]


def is_family(text: str) -> bool:
    """Whether a text names families, separated by commas, and is no plan."""
    return all(word.strip().partition(":")[0] in FAMILIES for word in text.split(","))


def variants(edits: object, depth: int, layers: range | None = None) -> list[Variant]:
    """What to measure, from any form in which it may be asked for.

    Args:
        wanted: families ("swap,drop"), a plan, its text, a route, a list of these, or a dictionary of plans by name.
        depth: number of blocks of the model.
        layers: for families, only edits that touch none but these blocks.

    Raises:
        PlanError: something that cannot be read, or nothing to measure.
    """
    found = list(dict.fromkeys(_variants(edits, depth, layers)))  # what is asked for twice is meant once
    if not found:
        where = "" if layers is None else f" with layers {layers.start}:{layers.stop}"
        raise PlanError(f"nothing to measure: {edits!r} has no edit of a model of {depth} blocks{where}")
    return found


def _variants(edits: object, depth: int, layers: range | None) -> Iterator[Variant]:
    match edits:
        case str() if is_family(edits):
            for name in edits.split(","):
                yield from family(name.strip(), depth, layers)
        case str():
            try:
                yield Variant.of("plan", Plan.parse(edits), depth)
            except PlanError as error:
                if re.fullmatch(r"[\w:,-]+", edits):  # looks like families
                    for name in edits.split(","):
                        _parse(name)
                raise error
        case Plan():
            yield Variant.of("plan", edits, depth)
        case Route():
            yield _of_route(edits, depth)
        case Mapping():
            for name, plan in edits.items():
                yield from (
                    Variant(variant.edit, variant.plan, variant.route, variant.layer, str(name))
                    for variant in _variants(plan, depth, layers)
                )
        case Sequence():
            for item in edits:
                yield from _variants(item, depth, layers)
        case _:
            raise PlanError(f"expected families ('swap,drop'), plans or routes, not {edits!r}")


def _of_route(route: Route, depth: int) -> Variant:
    if wrong := sorted({visit.block for visit in route if visit.block >= depth}):
        raise PlanError(f"the route visits block {wrong[0]}, and the model has {depth} blocks, 0 to {depth - 1}")
    if not route.canonical:
        raise PlanError("the route leaves no block; keep at least one")
    changed = (visit.block for visit, own in zip(route.canonical, Route.identity(depth), strict=False) if visit != own)
    plan = str(reorder(str(route.canonical)))
    return Variant("plan", plan, route.canonical, next(changed, len(route.canonical) % depth), plan)


def read_plans(text: str, where: str) -> dict[str, Plan]:
    """Read a file of plans: one on each line, `name: plan`, or the plan alone; `#` starts a comment.

    Args:
        text: what the file holds.
        where: what to call it in errors.

    Raises:
        PlanError: with the line's number.
    """
    plans: dict[str, Plan] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _NAMED.fullmatch(line)
        name, written = match.groups() if match else (line, line)
        try:
            plan = Plan.parse(written)
        except PlanError as error:
            raise PlanError(f"{where}, line {number}: {error}") from error
        if name in plans:
            raise PlanError(f"{where}, line {number}: a second plan is called {name!r}; give each a name of its own")
        plans[name] = plan
    if not plans:
        raise PlanError(f"{where} holds no plan: write one on each line, as in 'shallow: drop 20:24'")
    return plans


def _parse(name: str) -> tuple[str, int]:
    kind, colon, number = name.partition(":")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(FAMILIES)}"
        raise PlanError(f"unknown family of edits {name!r}; {hint}")
    if kind != "drop-span":
        if colon:
            raise PlanError(f"{name!r}: {kind} takes no number")
        return kind, 0
    if not re.fullmatch(r"[1-9]\d{0,5}", number):
        raise PlanError(f"{name!r}: how many blocks? Write drop-span:4 for every four neighbouring ones")
    return kind, int(number)


def _first_block(edit: Edit, depth: int) -> int:
    ref: Ref
    match edit:
        case Swap(first=ref):
            pass
        case Drop(blocks=blocks) | Skip(blocks=blocks):
            ref = blocks[0]
        case Move(blocks=ref) | Repeat(blocks=ref) | Reverse(blocks=ref):
            pass
        case Reorder(order=order):
            ref = order[0].ref
        case _:
            raise AssertionError(edit)
    return resolve(ref, depth)[0]
