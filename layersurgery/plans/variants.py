"""The edited models that a sweep measures: every swap, every drop, every skip, or the caller's own plans.

>>> from layersurgery.plans.variants import family
>>> [variant.plan for variant in family("swap", 4)]
['swap 0 1', 'swap 1 2', 'swap 2 3']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import PlanError
from .branch_edits import PickNeurons
from .edits import Edit, nearest_word
from .families import FAMILIES, Bounds, Cell, CountHeads
from .plan import Blocks, Plan, adjacent_blocks, reorder
from .route import Route, Span, parse_items, resolve
from .visit import branch_factor, source_name, whole_number

Edits = str | Edit | Plan | Route | Iterable["Edits"] | Mapping[str, "Edits"]
"""The edits to measure: families ("swap,drop"), a plan, its text, a route, a list of these, or a dictionary by name."""
Layers = Blocks | str | None
"""The blocks that families of edits may touch: a range, adjacent numbers, their text ("4:20"), or None for all."""
_LAYERS = "`layers` takes a range of adjacent blocks, for example range(4, 20) or '4:20'"
_NAMED = re.compile(r"([\w.+-]+)\s*:\s+(.*)")


@dataclass(frozen=True, slots=True)
class Variant:
    """One edited model of a sweep.

    Attributes:
        edit: its family, "plan" for the caller's own plan, or "none" for the unedited model.
        plan: the plan's text; empty for the unedited model.
        route: the edited model.
        layer: the layer that it is drawn at: the first block that the plan names, unless its family says another; None
            for the unedited model.
        name: the caller's name for it; the plan's text if there is none.
        cell: its place in the map of its family: the row and the column; None if the family has no map.
    """

    edit: str
    plan: str
    route: Route
    layer: int | None
    name: str = ""
    cell: Cell | None = None

    @classmethod
    def from_plan(
        cls, edit: str, plan: Plan, depth: int, layer: int | None = None, cell: Cell | None = None
    ) -> Variant:
        """Make the variant of a plan for a model of `depth` blocks.

        Raises:
            PlanError: the plan does not fit the depth, or is empty.
        """
        if not plan.edits:
            raise PlanError("an empty plan is the unedited model, which is always measured; remove this plan")
        if layer is None:
            layer = plan.edits[0].first_blocks(depth)[0]
        return cls(edit, str(plan), plan.route(depth), layer, str(plan), cell)


def unedited(depth: int) -> Variant:
    """Make the variant of the unedited model."""
    return Variant("none", "", Route.identity(depth), None, "unedited")


def family(
    name: str,
    depth: int,
    layers: Layers = None,
    max_span: int | None = None,
    heads: CountHeads | None = None,
    neurons: PickNeurons | None = None,
) -> list[Variant]:
    """Make all edits of one family that keep at least one of `depth` blocks, in the order of their first block.

    Args:
        name: one of `FAMILIES`; one that takes a number or a source with it, "drop-span:4" or "replace-from:base".
        depth: number of blocks.
        layers: only edits that touch no blocks except these, as a range or as text ("4:20").
        max_span: only spans of at most so many blocks, and only pairs of blocks at most so far apart.
        heads: returns the number of attention heads of a block; see `Bounds.heads`.
        neurons: returns neurons of a block by kind; see `Bounds.neurons`.

    Raises:
        PlanError: an unknown family (names the nearest known one), a span that is too long, or layers out of range.
    """
    kind, value = _parse_family(name)
    source = value if isinstance(value, str) else ""
    factor = value if isinstance(value, float) else 1.0
    number = value if isinstance(value, int) else 0
    if kind == "drop-span" and number > depth:
        raise PlanError(f"{name}: the model has only {depth} blocks; use a shorter span")
    if max_span is not None and (max_span := whole_number(max_span, "`max_span`")) < 1:
        raise PlanError(f"`max_span` is a number of blocks, at least 1, not {max_span}")
    bounds = Bounds(layer_range(layers, depth) or range(depth), depth, max_span, number, factor, source, heads, neurons)
    return [
        Variant.from_plan(kind, Plan((member.edit,)), depth, member.layer, member.cell)
        for member in FAMILIES[kind].members(bounds)
    ]


def layer_range(layers: Layers, depth: int) -> range | None:
    """Return the blocks that families of edits may touch; None for all.

    Args:
        layers: a range of the model's blocks, or their numbers; or its text, a half-open range such as "4:20", "4:" or
            "-4:".
        depth: number of blocks.

    Raises:
        PlanError: it is not one range of adjacent blocks of the model.

    >>> from layersurgery.plans.variants import layer_range
    >>> layer_range("-4:", 30)
    range(26, 30)
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        items = parse_items(layers)
        if len(items) != 1 or not isinstance(items[0].ref, Span) or not items[0].like.whole:
            raise PlanError(f"`layers` takes one half-open range, for example 4:20, not {layers!r}")
        blocks = resolve(items[0].ref, depth)
        return range(blocks[0], blocks[-1] + 1)
    if not isinstance(layers, range):
        try:
            blocks = resolve(adjacent_blocks(layers, "layers"), depth)
        except PlanError as error:
            raise PlanError(f"{_LAYERS}, not {layers!r} ({error})") from None
        return range(blocks[0], blocks[-1] + 1)
    if layers.step != 1 or not layers:
        raise PlanError(f"{_LAYERS}, not {layers!r}")
    if layers.start < 0 or layers.stop > depth:
        raise PlanError(
            f"layers {layers.start}:{layers.stop} are out of range: the model has {depth} blocks, 0 to {depth - 1}"
        )
    return layers


def is_family(text: str) -> bool:
    """Return whether a text names families, separated by commas, and not a plan."""
    return all(word.strip().partition(":")[0] in FAMILIES for word in text.split(","))


def parse_edits(edits: str) -> Plan | None:
    """Parse the text of a plan or the names of families; return the plan, or None for families.

    Raises:
        PlanError: it is neither (names the nearest family or edit).

    >>> from layersurgery.plans.variants import parse_edits
    >>> parse_edits("swap,drop-span:4"), str(parse_edits("drop 3; swap 1 2"))
    (None, 'drop 3; swap 1 2')
    """
    if not edits.strip():
        raise PlanError(f"no edit is named; name families ({', '.join(list(FAMILIES)[:3])}, ...) or a plan")
    if not is_family(edits):
        try:
            return Plan.parse(edits)
        except PlanError:
            if not re.fullmatch(r"[\w:.-]+(\s*,\s*[\w:.-]*)*", edits.strip()):  # does not look like families
                raise
    for name in edits.split(","):
        _parse_family(name.strip())
    return None


def variants(
    edits: Edits,
    depth: int,
    layers: Layers = None,
    max_span: int | None = None,
    heads: CountHeads | None = None,
    neurons: PickNeurons | None = None,
) -> list[Variant]:
    """Make the variants to measure from any accepted form of edits.

    Args:
        edits: families ("swap,drop"; see `FAMILIES`), a plan, its text, a route, a list of these, or a dictionary of
            plans by name.
        depth: number of blocks of the model.
        layers: for families, only edits that touch no blocks except these, as a range or as text ("4:20").
        max_span: for families of spans and pairs, only spans of at most so many blocks, and only pairs of blocks at
            most so far apart.
        heads: for the family of heads, returns the number of attention heads of a block; see `families.Bounds.heads`.
        neurons: for neurons by kind, in families and in plans: returns neurons of a block.

    Raises:
        PlanError: an edit cannot be read, or there is nothing to measure.
    """
    chosen = layer_range(layers, depth)
    unique = list(dict.fromkeys(_variants(edits, depth, chosen, max_span, heads, neurons)))
    if not unique:
        where = "" if chosen is None else f" with layers {chosen.start}:{chosen.stop}"
        where += "" if max_span is None else f" and spans of at most {max_span}"
        named = edits[0] if isinstance(edits, list) and len(edits) == 1 else edits
        raise PlanError(
            f"nothing to measure: {named!r} has no edit of a model of {depth} block{'s'[: depth != 1]}{where}"
        )
    if max_span is not None and not any(
        variant.edit in FAMILIES and FAMILIES[variant.edit].bounded for variant in unique
    ):
        names = ", ".join(family.name for family in FAMILIES.values() if family.bounded)
        raise PlanError(f"`max_span` has no effect on these edits; it bounds {names}")
    return unique


def _variants(
    edits: Edits,
    depth: int,
    layers: range | None,
    max_span: int | None,
    heads: CountHeads | None,
    neurons: PickNeurons | None,
) -> Iterator[Variant]:
    match edits:
        case str():
            parsed = parse_edits(edits)
            if parsed is not None:
                yield _of_plan(parsed, depth, neurons)
            else:
                for name in edits.split(","):
                    yield from family(name.strip(), depth, layers, max_span, heads, neurons)
        case Edit():
            yield _of_plan(Plan((edits,)), depth, neurons)
        case Plan():
            yield _of_plan(edits, depth, neurons)
        case Route():
            yield _of_route(edits, depth)
        case Mapping():
            for name, plan in edits.items():
                for variant in _variants(plan, depth, layers, max_span, heads, neurons):
                    yield replace(variant, name=str(name))
        case Iterable() if not isinstance(edits, bytes):
            for item in edits:
                yield from _variants(item, depth, layers, max_span, heads, neurons)
        case _:
            raise PlanError(f"expected families ('swap,drop'), plans or routes, not {edits!r}")


def _of_plan(plan: Plan, depth: int, neurons: PickNeurons | None) -> Variant:
    if neurons is None or not plan.needs_weights:
        return Variant.from_plan("plan", plan, depth)
    return replace(Variant.from_plan("plan", plan.resolved(depth, neurons), depth), name=str(plan))


def _of_route(route: Route, depth: int) -> Variant:
    route = route.checked(depth)
    changed = (visit.block for visit, original in zip(route, Route.identity(depth), strict=False) if visit != original)
    plan = str(reorder(str(route)))
    return Variant("plan", plan, route, next(changed, len(route) % depth), plan)


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


def _parse_family(name: str) -> tuple[str, int | float | str]:
    """Return the family's name, and the whole number, the factor as a float or the source after it; 0 for none."""
    kind, colon, number = name.partition(":")
    if kind not in FAMILIES:
        near = nearest_word(kind, FAMILIES)
        hint = f"did you mean {near!r}?" if near else f"they are {', '.join(FAMILIES)}"
        raise PlanError(f"unknown family of edits {name!r}; {hint}")
    if FAMILIES[kind].has_source:
        try:
            return kind, source_name(number)
        except PlanError:
            raise PlanError(
                f"{name!r}: {kind} takes the name of a source; write {kind}:base, and give it with --source base=MODEL "
                "(sources={'base': model} in Python)"
            ) from None
    expected = FAMILIES[kind].number
    if expected is None:
        if colon:
            raise PlanError(f"{name!r}: {kind} takes no number")
        return kind, 0
    if not expected.whole:
        try:
            factor = float(branch_factor(number, name))
        except PlanError:
            factor = 1.0
        if factor == 1:
            raise PlanError(f"{name!r}: {kind} takes a factor other than 1; write {kind}:0.5, for example")
        return kind, factor
    if not colon and expected.default is not None:
        return kind, expected.default
    if not re.fullmatch(r"[1-9]\d{0,3}", number) or int(number) < expected.least:
        raise PlanError(
            f"{name!r}: {kind} takes a number of {expected.what}, {expected.least} to 9999; write {kind}:4, for example"
        )
    return kind, int(number)
