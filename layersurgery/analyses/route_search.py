"""Search routes with fewer or more visits than the model has blocks, one level of length after another.

A move drops a span of the route, or repeats one. A *level* holds the routes that differ from the model's own by so many
visits; its candidates are all moves from the *beams*, the best routes of the levels before. With a beam of one and
spans of one block, removal is greedy pruning by KL: each step measures the remaining model without each of its blocks.

>>> from layersurgery.analyses.route_search import SearchSpace
>>> from layersurgery.plans.route import Route
>>> space = SearchSpace.of(4, remove=2, max_span=2, beam=1)
>>> [str(route) for route in space.candidates([[Route.identity(4)], [Route.parse("0 2 3")]])]
['2 3', '0 3', '0 2', '0 1']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise, takewhile
from typing import Any

import pandas as pd

from ..errors import MeasurementError, PlanError
from ..plans.plan import Plan
from ..plans.route import Route
from ..plans.visit import whole_number
from .removable_parts import kept_layers

BEAM = 4
FINAL = "search"
"""Directory of the last measurement, and name of its table."""
_SPAN_OF_REPEATS = 8  # longer spans are searched if they are asked for: their number grows with the square
_MOST_TIMES = 4  # as deep as the model; a mistyped number would be searched for days


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Define the routes of a search.

    Attributes:
        depth: number of blocks of the model.
        target: number of visits of the final routes.
        max_span: largest number of adjacent visits that one move drops or repeats.
        beam: number of routes of each level that later levels continue from.
        keep: blocks that are not dropped.
    """

    depth: int
    target: int
    max_span: int
    beam: int = BEAM
    keep: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        blocks: int,
        *,
        depth: int | None = None,
        remove: int | None = None,
        repeat: int | None = None,
        max_span: int | None = None,
        beam: int = BEAM,
        keep: Any = None,
    ) -> SearchSpace:
        """Make the space of a search that ends at a depth, or removes or repeats a number of layers.

        Args:
            blocks: number of blocks of the model.
            depth: number of visits of the final routes.
            remove: how many fewer these are than the blocks.
            repeat: how many more these are than the blocks.
            max_span: largest number of adjacent visits that one move drops or repeats. By default 1 for removals. For
                repeats, the number of visits to add, at most 8: a good repeat of a span need not contain a good repeat
                of a shorter one.
            beam: number of routes of each level that later levels continue from.
            keep: layers that are not dropped, as for `kept_layers`; only for removals.

        Raises:
            PlanError: not exactly one of the three numbers is given, or a number is out of range.
        """
        given = {"depth": depth, "remove": remove, "repeat": repeat}
        named = {name: whole_number(value, f"`{name}`") for name, value in given.items() if value is not None}
        if len(named) != 1:
            found = f"not both {' and '.join(f'`{name}`' for name in named)}" if named else "none is given"
            raise PlanError(f"a search needs one of `depth`, `remove` and `repeat`; {found}")
        ((name, number),) = named.items()
        target = {"depth": number, "remove": blocks - number, "repeat": blocks + number}[name]
        most = _MOST_TIMES * blocks
        if name == "remove" and not 1 <= number < blocks:
            raise PlanError(
                f"cannot remove {number} of {blocks} layers; give 1 to {blocks - 1}"
                if blocks > 1
                else "the model has one layer, which cannot be removed"
            )
        if name == "repeat" and not 1 <= number <= most - blocks:
            raise PlanError(f"cannot repeat {number} layers of {blocks}; give 1 to {most - blocks}")
        if not 1 <= target <= most:
            raise PlanError(f"`depth` {number} is out of range for a model of {blocks} blocks; give 1 to {most}")
        if target == blocks:
            raise PlanError(f"`depth` {number} is the model's own; give fewer to remove layers, more to repeat some")
        changes = abs(target - blocks)
        if max_span is None:
            max_span = 1 if target < blocks else min(changes, _SPAN_OF_REPEATS, blocks)
        kept = kept_layers(keep, blocks)
        if kept and target > blocks:
            raise PlanError("`keep` names layers that are not removed; a search of repeats removes none")
        if kept and changes > blocks - len(kept):
            raise PlanError(
                f"cannot remove {changes} of {blocks} layers, and keep {len(kept)} of them; give 1 to "
                f"{blocks - len(kept)}"
            )
        spans, beam = whole_number(max_span, "`max_span`"), whole_number(beam, "`beam`")
        if not 1 <= spans <= changes:
            raise PlanError(f"`max_span` is 1 to {changes}, the number of layers to change, not {spans}")
        if beam < 1:
            raise PlanError(f"`beam` is the number of routes to continue from, at least 1, not {beam}")
        return cls(blocks, target, spans, beam, kept)

    @property
    def removes(self) -> bool:
        """Return whether the moves drop spans; else they repeat them."""
        return self.target < self.depth

    @property
    def levels(self) -> int:
        """Return the number of levels: by how many visits the final routes differ from the model's own."""
        return abs(self.target - self.depth)

    def visits(self, level: int) -> int:
        """Return the number of visits of a level's routes."""
        return self.depth - level if self.removes else self.depth + level

    def moves(self, route: Route, span: int) -> Iterator[Route]:
        """Yield the routes that one move of so many adjacent visits makes of a route."""
        for start in range(len(route) - span + 1):
            stop = start + span
            if self.keep and not self.keep.isdisjoint(route.blocks[start:stop]):
                continue
            yield Route(route[:start] + route[stop:]) if self.removes else Route(route[:stop] + route[start:])

    def candidates(self, beams: Sequence[Sequence[Route]]) -> dict[Route, Route]:
        """Return the candidates of the next level, each with the route that it was made from.

        Args:
            beams: the best routes of each level before, from level 0, which holds the model's own.

        Returns:
            The parent of each candidate, the first one if several lead to it: shorter moves are before longer ones, and
            the best routes of a level before the others.
        """
        parents: dict[Route, Route] = {}
        for span in range(1, min(self.max_span, len(beams)) + 1):
            for parent in beams[-span]:
                for route in self.moves(parent, span):
                    parents.setdefault(route, parent)
        return parents


def level_name(level: int) -> str:
    """Return the name of a level's directory."""
    return f"level-{level:02}"


def search_levels(
    space: SearchSpace,
    measure: Callable[[int, Sequence[Route]], pd.DataFrame],
) -> Iterator[pd.DataFrame]:
    """Measure one level after another.

    Args:
        space: the routes.
        measure: measures the routes of the level with this number. Returns a row for each route that could be measured,
            with its text in `route`, and in `place` its place among them from 1, missing where its score is not finite.
            `frame.attrs["skipped"]` has the reasons for the others, by their plans.

    Yields:
        A row for each candidate of the level: level, parent, route, plan, block_calls, reason (why it could not be
        measured), the columns of what was measured, measured, and kept (whether it is in the beam).

    Raises:
        MeasurementError: no route is left.
    """
    beams: list[tuple[Route, ...]] = [(Route.identity(space.depth),)]
    for level in range(1, space.levels + 1):
        parents = space.candidates(beams)
        if not parents:
            raise MeasurementError(
                f"no route of {space.visits(level)} blocks is left: the scores of all routes before are NaN or infinite"
            )
        routes = list(parents)
        frame = measure(level, routes)
        plans = [str(plan_of(route, space.depth)) for route in routes]
        skipped = frame.attrs.get("skipped", {})
        table = pd.DataFrame(
            {
                "level": level,
                "parent": list(map(str, parents.values())),
                "route": list(map(str, routes)),
                "plan": plans,
                "block_calls": space.visits(level),
                "reason": [skipped.get(plan, "") for plan in plans],
            }
        )
        table = table.merge(frame[["route", *frame.columns.difference(table.columns, sort=False)]], "left", "route")
        table["measured"] = table.route.isin(frame.route)
        table["kept"] = (table.place <= space.beam).fillna(value=False).astype(bool)
        beams.append(tuple(map(Route.parse, table[table.kept].sort_values("place").route)))
        yield table
    if not beams[-1]:
        raise MeasurementError(f"the scores of all routes of {space.target} blocks are NaN or infinite")


def one_shot(space: SearchSpace, blocks: Sequence[int]) -> list[Route]:
    """Return for each level the route that drops or repeats the first blocks of a list, each once.

    Args:
        space: the routes.
        blocks: blocks in the order in which they would be chosen if each was measured by itself.
    """
    times = 0 if space.removes else 2
    chosen = [set(blocks[:level]) for level in range(1, min(space.levels, len(blocks)) + 1)]
    return [
        Route(block for block in range(space.depth) for _ in range(times if block in some else 1)) for some in chosen
    ]


def changed_block(route: Route, depth: int) -> int:
    """Return the block that a route of the first level drops or repeats."""
    return next(block for block in range(depth) if route.blocks.count(block) != 1)


@lru_cache(maxsize=4096)
def plan_of(route: Route, depth: int) -> Plan:
    """Return the plan of a route: `drop` for a removal, else the shortest text of `repeat` edits or a `reorder`.

    >>> from layersurgery.analyses.route_search import plan_of
    >>> from layersurgery.plans.route import Route
    >>> [str(plan_of(Route.parse(text), 6)) for text in ("0 3:6", "0:4 2:6", "0 1 1 2 2 3:6", "0:3 1 2 1 3:6")]
    ['drop 1 2', 'repeat 2:4', 'repeat 1:3 each', 'reorder 0:3 1 2 1 3:6']
    """
    visits = route.blocks
    if len(visits) < depth and all(first < second for first, second in pairwise(visits)):
        return Plan.parse(f"drop {Route(block for block in range(depth) if block not in visits)}")
    plans = [f"reorder {route}"]
    if (repeats := _repeats(visits, depth)) is not None:
        plans.insert(0, "; ".join(repeats))
    return Plan.parse(min(plans, key=len))


def _repeats(visits: Sequence[int], depth: int) -> tuple[str, ...] | None:
    """Return the `repeat` edits of separate spans that make these visits, with the shortest text; None if none do."""

    @cache
    def edits(start: int, block: int) -> tuple[str, ...] | None:
        """Return the edits that make the visits from `start` on, of which this block is the first."""
        if start == len(visits):
            return () if block == depth else None
        options = []
        times = sum(1 for _ in takewhile(lambda visit: visit == block, visits[start:]))
        for stop in range(block + 1, depth + 1):
            span, passes = tuple(range(block, stop)), 0
            while visits[start + passes * len(span) : start + (passes + 1) * len(span)] == span:
                passes += 1
            each = tuple(visit for visit in span for _ in range(times))
            is_each = times > 1 and len(span) > 1 and visits[start : start + len(each)] == each
            if not passes and not is_each:
                break
            for count, word in ((passes, ""), (times if is_each else 0, " each")):
                # A span that is passed once is its blocks, one after another.
                if count > 1 or (count == 1 and len(span) == 1):
                    others = edits(start + count * len(span), stop)
                    blocks = f"{block}:{stop}" if len(span) > 1 else f"{block}"
                    repeat = (f"repeat {blocks}{word}{f' x{count}' if count > 2 else ''}",) if count > 1 else ()
                    options += [] if others is None else [repeat + others]
        return min(options, key=lambda texts: len("; ".join(texts)), default=None)

    return edits(0, 0)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Return which points are not dominated: no other has neither a higher cost nor a higher score, and one lower.

    A point whose score is not finite is dominated.

    >>> from layersurgery.analyses.route_search import pareto_front
    >>> pareto_front([3, 2, 2, 1], [0.0, 0.5, 0.4, float("nan")])
    [True, False, True, False]
    """
    points = [(cost, score) for cost, score in zip(costs, scores, strict=True) if math.isfinite(score)]
    return [
        math.isfinite(score)
        and not any(other <= cost and value <= score and (other, value) != (cost, score) for other, value in points)
        for cost, score in zip(costs, scores, strict=True)
    ]
