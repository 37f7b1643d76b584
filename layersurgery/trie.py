"""Many routes at once: a prefix that routes share is run once, and the unedited model is a prefix of nearly all.

The unedited model is the *trunk*: state k is the residual stream before its block k, and state `depth` that behind the last.
Routes leave the trunk where they first differ from it. What follows is a tree, walked depth first from the trunk's end to its
beginning, so that the trunk's states are given up one after another.

>>> swap_and_drop = schedule([Route.parse("1 0 2"), Route.parse("1 2")], depth=3)
>>> swap_and_drop.calls, swap_and_drop.calls_apart  # block 1 upon the embedding is shared
(7, 8)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .route import Route, Visit


@dataclass(frozen=True, slots=True)
class Run:
    """Run a block on the stream `state`, which gives the stream `result`."""

    visit: Visit
    state: int
    result: int


@dataclass(frozen=True, slots=True)
class Read:
    """Measure the stream `state`, which is the end of these routes."""

    state: int
    routes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, and the states that nobody needs afterwards."""

    do: Run | Read
    free: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to do upon a batch, in order, once the trunk has run.

    Attributes:
        depth: blocks of the unedited model.
        steps: block calls and measurements.
        kept: states of the trunk that are needed when it has run; its end is always one, which the unedited model is read from first.
        calls_apart: block calls of all routes and the trunk, if each was run by itself.
        states_at_peak: streams that are alive together at the widest point.
    """

    depth: int
    steps: tuple[Step, ...]
    kept: frozenset[int]
    calls_apart: int
    states_at_peak: int

    @property
    def ends_unedited(self) -> bool:
        """Whether a route is the trunk itself, so that the trunk's end is measured as a route, too."""
        return any(isinstance(step.do, Read) and step.do.state == self.depth for step in self.steps)

    @property
    def calls(self) -> int:
        """Block calls in all, the trunk's included."""
        return self.depth + sum(isinstance(step.do, Run) for step in self.steps)


@dataclass(slots=True)
class _Node:
    """A place in the tree, reached by one prefix of routes."""

    children: dict[Visit, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    width: int = 1  # states alive together below it, its own included

    def ordered(self) -> list[tuple[Visit, _Node]]:
        """The widest child last: then this node's own state is no longer held beside it."""
        return sorted(self.children.items(), key=lambda item: item[1].width)


def schedule(routes: Sequence[Route], depth: int) -> Schedule:
    """Plan how to run `routes` through a model of `depth` blocks with as few block calls as sharing prefixes allows.

    Routes are numbered as given; one that occurs twice is run once.
    """
    root = _Node()
    order = [root]
    for number, route in enumerate(routes):
        node = root
        for visit in route:
            if visit not in node.children:
                node.children[visit] = _Node()
                order.append(node.children[visit])
            node = node.children[visit]
        node.ends.append(number)
    trunk: list[_Node] = [root]
    for block in range(depth):
        before = trunk[-1]
        # Off the trunk, children alone are branches.
        trunk.append(before.children.pop(Visit(block), _Node()))
    for node in reversed(order):
        widths = [child.width for _, child in node.ordered()]
        node.width = max([1, *(width + 1 for width in widths[:-1]), *(max(2, width) for width in widths[-1:])])
    steps = tuple(_steps(trunk, depth))
    needed = {state for state, node in enumerate(trunk) if node.children or node.ends}
    kept = frozenset({depth, *needed})
    return Schedule(depth, steps, kept, depth + sum(map(len, set(routes))), max(len(kept), _peak(steps, len(needed))))


def _steps(trunk: list[_Node], depth: int) -> Iterator[Step]:
    fresh = depth
    for state in reversed(range(depth + 1)):
        # (visit that leads to the node, its parent's state, whether the parent's state is then done with, the node)
        waiting: list[tuple[Visit | None, int, bool, _Node]] = [(None, state, False, trunk[state])]
        while waiting:
            visit, parent, last, node = waiting.pop()
            own = parent
            if visit is not None:
                fresh += 1
                own = fresh
                yield Step(Run(visit, parent, own), (parent,) if last else ())
            children = node.ordered()
            if node.ends:
                yield Step(Read(own, tuple(node.ends)), () if children else (own,))
            for place, (onward, child) in reversed(list(enumerate(children))):
                waiting.append((onward, own, place == len(children) - 1, child))


def _peak(steps: Sequence[Step], alive: int) -> int:
    peak = alive
    for step in steps:
        alive += isinstance(step.do, Run)
        peak = max(peak, alive)
        alive -= len(step.free)
    return peak
