"""Many routes at once: a prefix that routes share is run once, and the unedited model is a prefix of nearly all.

The unedited model is the *trunk*: state k is the residual stream before its block k, and state `depth` that behind the last.
Routes leave the trunk where they first differ from it. What follows is a tree. There are two ways through it, which compute the same:

- *depth first*, from the trunk's end to its beginning, so that the trunk's states are given up one after another. It needs the least
  memory for streams, and all blocks at hand.
- *layer by layer*, while the trunk itself runs: at each block, all routes that have come to it go through it. Each block is brought
  in once, or a few times where routes go back, whatever the number of routes; but all routes' streams are alive together.

>>> swap_and_drop = schedule([Route.parse("1 0 2"), Route.parse("1 2")], depth=3)
>>> swap_and_drop.calls, swap_and_drop.calls_apart  # block 1 upon the embedding is shared
(7, 8)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..plans.route import Route, Visit

DEPTH_FIRST, LAYER_MAJOR = "depth-first", "layer-major"
_MAX_RESIDENT = 8


@dataclass(frozen=True, slots=True)
class RunBlock:
    """Run a block on the stream `state`, which gives the stream `result`."""

    visit: Visit
    state: int
    result: int


@dataclass(frozen=True, slots=True)
class ReadLogits:
    """Measure the stream `state`, which is the end of these routes."""

    state: int
    routes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Have a block's weights at hand; those of `instead_of` are let go."""

    block: int
    evict: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, and the states that nobody needs afterwards."""

    action: RunBlock | ReadLogits | LoadWeights
    release: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to do upon a batch, in order.

    Attributes:
        depth: blocks of the unedited model.
        steps: block calls and measurements, once the trunk has run.
        kept: states of the trunk that routes leave it from; its end is always one, which the unedited model is read from first.
        calls_apart: block calls of all routes and the trunk, if each was run by itself.
        states_at_peak: streams that are alive together at the widest point.
        during: layer by layer, what to do at each block while the trunk runs: first bring it in; the rest when the trunk is through it.
        at_home: blocks whose weights are at hand together; None where all are.
    """

    depth: int
    steps: tuple[Step, ...]
    saved_states: frozenset[int]
    calls_without_sharing: int
    states_at_peak: int
    during_trunk: tuple[tuple[Step, ...], ...] = ()
    resident_blocks: int | None = None

    @property
    def name(self) -> str:
        """Which way it goes."""
        return LAYER_MAJOR if self.during_trunk else DEPTH_FIRST

    @property
    def needs_final_state(self) -> bool:
        """Whether the trunk's end is needed after the unedited model was read from it: a route ends there, or goes on from there."""
        return any(
            isinstance(step.action, RunBlock | ReadLogits) and step.action.state == self.depth for step in self.steps
        )

    @property
    def all_steps(self) -> Iterator[Step]:
        """Those beside the trunk and those after it."""
        for steps in (*self.during_trunk, self.steps):
            yield from steps

    @property
    def calls(self) -> int:
        """Block calls in all, the trunk's included."""
        return self.depth + sum(isinstance(step.action, RunBlock) for step in self.all_steps)

    def bytes_read(self, blocks: Sequence[int], around: int) -> int:
        """Bytes that a batch brings in: for offloaded bytes of each block, and of what is around them.

        Depth first, a block is brought in for each call.
        """
        visits = self.load_order
        if not self.during_trunk:
            visits = (
                *range(self.depth),
                *(step.action.visit.block for step in self.steps if isinstance(step.action, RunBlock)),
            )
        return sum(blocks[block] for block in visits) + around

    def bytes_in_flight(self, blocks: Sequence[int]) -> int:
        """Bytes of offloaded blocks that are at hand together, with the one that is read ahead."""
        return max(blocks) * ((self.resident_blocks or 0) + 1)

    @property
    def load_order(self) -> tuple[int, ...]:
        """Layer by layer, the blocks that are brought in, in their order."""
        return tuple(step.action.block for step in self.all_steps if isinstance(step.action, LoadWeights))


@dataclass(slots=True)
class _Node:
    """A place in the tree, reached by one prefix of routes."""

    children: dict[Visit, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    width: int = 1  # states alive together below it, its own included

    def ordered(self) -> list[tuple[Visit, _Node]]:
        """The widest child last: then this node's own state is no longer held beside it."""
        return sorted(self.children.items(), key=lambda item: item[1].width)


def schedule(routes: Sequence[Route], depth: int, run_only: Sequence[Route] = ()) -> Schedule:
    """Plan how to run `routes` through a model of `depth` blocks, depth first, with as few block calls as sharing prefixes allows.

    Routes are numbered as given; one that occurs twice is run once. Those of `walked` are run as well, and their ends are not measured.
    """
    trunk, order = _build_trie(routes, depth, run_only)
    for node in reversed(order):
        widths = [child.width for _, child in node.ordered()]
        node.width = max([1, *(width + 1 for width in widths[:-1]), *(max(2, width) for width in widths[-1:])])
    steps = tuple(_steps(trunk, depth))
    kept, alive = _saved_states(trunk, depth)
    apart = depth + sum(map(len, {*routes, *run_only}))
    return Schedule(depth, steps, kept, apart, max(len(kept), _peak(steps, alive)))


def layer_major(
    routes: Sequence[Route], depth: int, max_resident: int = _MAX_RESIDENT, run_only: Sequence[Route] = ()
) -> Schedule:
    """Plan the same, layer by layer: so that blocks are brought in as seldom as possible, with `most` of them at hand together.

    No more are kept at hand than help: one for drops, two for swaps of neighbours, which go back one block.
    """
    best = _schedule_by_layer(routes, depth, 1, run_only)
    for at_home in range(2, min(max_resident, depth) + 1):
        if len(best.load_order) == depth:
            break
        plan = _schedule_by_layer(routes, depth, at_home, run_only)
        best = plan if len(plan.load_order) < len(best.load_order) else best
    return best


def _build_trie(routes: Sequence[Route], depth: int, run_only: Sequence[Route]) -> tuple[list[_Node], list[_Node]]:
    """The trunk's nodes, whose children are the branches off it, and all nodes, parents first."""
    root = _Node()
    order = [root]
    for number, route in enumerate((*routes, *run_only)):
        node = root
        for visit in route:
            if visit not in node.children:
                node.children[visit] = _Node()
                order.append(node.children[visit])
            node = node.children[visit]
        if number < len(routes):
            node.ends.append(number)
    trunk: list[_Node] = [root]
    for block in range(depth):
        trunk.append(trunk[-1].children.pop(Visit(block), _Node()))
    return trunk, order


def _saved_states(trunk: list[_Node], depth: int) -> tuple[frozenset[int], int]:
    """States of the trunk to keep, and how many of them for routes."""
    needed = {state for state, node in enumerate(trunk) if node.children or node.ends}
    return frozenset({depth, *needed}), len(needed)


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
                unread = () if node.children or node.ends else (own,)
                yield Step(RunBlock(visit, parent, own), ((parent,) if last else ()) + unread)
            children = node.ordered()
            if node.ends:
                yield Step(ReadLogits(own, tuple(node.ends)), () if children else (own,))
            for place, (onward, child) in reversed(list(enumerate(children))):
                waiting.append((onward, own, place == len(children) - 1, child))


def _peak(steps: Sequence[Step], alive: int) -> int:
    peak = alive
    for step in steps:
        alive += isinstance(step.action, RunBlock)
        peak = max(peak, alive)
        alive -= len(step.release)
    return peak


def _schedule_by_layer(
    routes: Sequence[Route], depth: int, resident_blocks: int, run_only: Sequence[Route]
) -> Schedule:
    trunk, _ = _build_trie(routes, depth, run_only)
    walk = _LayerByLayer(resident_blocks, depth)
    during = []
    for block in range(depth):
        walk.reach(block, trunk[block])
        during.append(tuple(walk.at(block)))
    walk.reach(depth, trunk[depth])
    kept, _ = _saved_states(trunk, depth)
    steps = tuple(walk.rest())
    plan = Schedule(depth, steps, kept, depth + sum(map(len, {*routes, *run_only})), 0, tuple(during), resident_blocks)
    return replace(plan, states_at_peak=_peak_by_layer(plan))


class _LayerByLayer:
    """Walks the tree block by block; what it yields is what a sweep does."""

    def __init__(self, resident_blocks: int, depth: int) -> None:
        self.resident_blocks = resident_blocks
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.waiting: dict[int, list[tuple[Visit, int, _Node]]] = {}
        self.uses: dict[int, int] = {}
        self.ended: list[tuple[int, _Node]] = []
        self.fresh = depth

    def reach(self, state: int, node: _Node) -> None:
        """A stream is there: its routes wait for the blocks that they visit next."""
        self.uses[state] = len(node.children) + bool(node.ends)
        if node.ends:
            self.ended.append((state, node))
        for visit, child in node.ordered():
            self.waiting.setdefault(visit.block, []).append((visit, state, child))

    def at(self, block: int) -> Iterator[Step]:
        """Bring a block in, and have everybody go on who can."""
        if block not in self.resident:
            away = []
            while len(self.resident) >= self.resident_blocks:
                away.append(self.resident.popitem(last=False)[0])
            self.resident[block] = None
            yield Step(LoadWeights(block, tuple(away)))
        while ready := [number for number in self.resident if self.waiting.get(number)]:
            yield from self._through(ready[-1])

    def _through(self, block: int) -> Iterator[Step]:
        for visit, state, node in self.waiting.pop(block):
            self.fresh += 1
            unread = () if node.children or node.ends else (self.fresh,)
            yield Step(RunBlock(visit, state, self.fresh), self._used(state) + unread)
            self.reach(self.fresh, node)

    def _used(self, state: int) -> tuple[int, ...]:
        self.uses[state] -= 1
        return () if self.uses[state] else (state,)

    def read(self) -> Iterator[Step]:
        """Measure what has come to its end."""
        for state, node in self.ended:
            yield Step(ReadLogits(state, tuple(node.ends)), self._used(state))
        self.ended.clear()

    def rest(self) -> Iterator[Step]:
        """What is left when the trunk has run: round after round through the blocks that somebody waits for."""
        yield from self.read()
        block = -1
        while waiting := sorted(number for number, routes in self.waiting.items() if routes):
            block = next((number for number in waiting if number > block), waiting[0])
            yield from self.at(block)
            yield from self.read()


def _peak_by_layer(plan: Schedule) -> int:
    alive = peak = 0
    for block, steps in enumerate(plan.during_trunk):
        alive += block in plan.saved_states
        peak = max(peak, alive)
        for step in steps:
            alive += isinstance(step.action, RunBlock)
            peak = max(peak, alive)
            alive -= len(step.release)
    alive += 1
    peak = max(peak, alive)
    return max(peak, _peak(plan.steps, alive - (not plan.needs_final_state)))
