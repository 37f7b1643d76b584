"""The edited models that a sweep measures: every swap, every drop, every skip, or the caller's own plans.

>>> from layersurgery.plans.variants import family
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
    "swap": "swap every two adjacent blocks",
    "drop": "drop every block",
    "skip-attention": "skip the attention of every block",
    "skip-mlp": "skip the MLP of every block",
    "drop-span": "drop every N adjacent blocks; written drop-span:N",
    "swap-pairs": "swap every two blocks",
}
_NAMED = re.compile(r"([\w.+-]+)\s*:\s+(.*)")


@dataclass(frozen=True, slots=True)
class Variant:
    """One edited model of a sweep.

    Attributes:
        edit: its family, "plan" for the caller's own plan, or "none" for the unedited model.
        plan: the plan's text; empty for the unedited model.
        route: the edited model.
        layer: the first block that the plan names; None for the unedited model.
        name: the caller's name for it; the plan's text if there is none.
    """

    edit: str
    plan: str
    route: Route
    layer: int | None
    name: str = ""

    @classmethod
    def from_plan(cls, edit: str, plan: Plan, depth: int, name: str = "") -> Variant:
        """Make the variant of a plan for a model of `depth` blocks.

        Raises:
            PlanError: the plan does not fit the depth, or is empty.
        """
        if not plan.edits:
            raise PlanError("an empty plan is the unedited model, which is always measured; remove this plan")
        return cls(edit, str(plan), plan.route(depth), _first_block(plan.edits[0], depth), name or str(plan))


def unedited(depth: int) -> Variant:
    """Make the variant of the unedited model."""
    return Variant("none", "", Route.identity(depth), None, "unedited")


def family(name: str, depth: int, layers: range | None = None) -> list[Variant]:
    """Make all edits of one family that keep at least one of `depth` blocks, in the order of their first block.

    Args:
        name: one of `FAMILIES`; drop-span with the length of the span, "drop-span:4".
        depth: number of blocks.
        layers: only edits of these blocks.

    Raises:
        PlanError: an unknown family (names the nearest known one), or a span that is too long.
    """
    kind, span = _parse(name)
    blocks = range(depth) if layers is None else layers
    if not set(blocks) <= set(range(depth)):
        raise PlanError(
            f"layers {blocks.start}:{blocks.stop} are out of range: the model has {depth} blocks, 0 to {depth - 1}"
        )
    if span >= depth:
        raise PlanError(
            f"{name}: a model of {depth} blocks cannot drop {span} and keep at least one; use a shorter span"
        )
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
    return [Variant.from_plan(kind, Plan((edit,)), depth) for edit in edits]


def is_family(text: str) -> bool:
    """Return whether a text names families, separated by commas, and not a plan."""
    return all(word.strip().partition(":")[0] in FAMILIES for word in text.split(","))


def variants(edits: object, depth: int, layers: range | None = None) -> list[Variant]:
    """Make the variants to measure from any accepted form of edits.

    Args:
        edits: families ("swap,drop"), a plan, its text, a route, a list of these, or a dictionary of plans by name.
        depth: number of blocks of the model.
        layers: for families, only edits of these blocks.

    Raises:
        PlanError: an edit cannot be read, or there is nothing to measure.
    """
    unique = list(dict.fromkeys(_variants(edits, depth, layers)))
    if not unique:
        where = "" if layers is None else f" with layers {layers.start}:{layers.stop}"
        raise PlanError(f"nothing to measure: {edits!r} has no edit of a model of {depth} blocks{where}")
    return unique


def _variants(edits: object, depth: int, layers: range | None) -> Iterator[Variant]:
    match edits:
        case str() if is_family(edits):
            for name in edits.split(","):
                yield from family(name.strip(), depth, layers)
        case str():
            try:
                yield Variant.from_plan("plan", Plan.parse(edits), depth)
            except PlanError as error:
                if re.fullmatch(r"[\w:,-]+", edits):  # looks like families
                    for name in edits.split(","):
                        _parse(name)
                raise error
        case Plan():
            yield Variant.from_plan("plan", edits, depth)
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
        raise PlanError("the route has no block; keep at least one")
    changed = (
        visit.block
        for visit, original in zip(route.canonical, Route.identity(depth), strict=False)
        if visit != original
    )
    plan = str(reorder(str(route.canonical)))
    return Variant("plan", plan, route.canonical, next(changed, len(route.canonical) % depth), plan)


def read_plans(text: str, source_name: str) -> dict[str, Plan]:
    """Read a file of plans: one on each line, `name: plan`, or the plan alone; `#` starts a comment.

    Args:
        text: the content of the file.
        source_name: the name of the file, for errors.

    Raises:
        PlanError: a line cannot be read; gives its number.
    """
    plans: dict[str, Plan] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = _NAMED.fullmatch(line)
        name, plan_text = match.groups() if match else (line, line)
        try:
            plan = Plan.parse(plan_text)
        except PlanError as error:
            raise PlanError(f"{source_name}, line {number}: {error}") from error
        if name in plans:
            raise PlanError(
                f"{source_name}, line {number}: a second plan has the name {name!r}; give each plan a different name"
            )
        plans[name] = plan
    if not plans:
        raise PlanError(f"{source_name} contains no plan: write one on each line, as in 'shallow: drop 20:24'")
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
        raise PlanError(f"{name!r} has no number of blocks; write drop-span:4 for every four adjacent blocks")
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
