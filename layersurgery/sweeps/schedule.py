"""Schedule the block calls of many routes so that a prefix that several routes share is run only once.

The unedited model is the *trunk*: state k is the residual stream before its block k, and state `depth` is the stream
after the last block. Each route leaves the trunk at the first visit that differs from it. The visits after that form a
tree (a trie). There are two orders in which to run it, and both compute the same streams:

- *depth first*, from the trunk's end to its beginning, so that the trunk's states are released one after another. This
  needs the least memory for streams, but the weights of all blocks in memory.
- *layer by layer*, while the trunk itself runs: at each block, every route that has reached this block is run through
  it. Each block's weights are loaded once, or a few times where routes go back to earlier blocks, however many routes
  there are. But the streams of all routes are in memory together.

>>> from layersurgery.plans.route import Route
>>> from layersurgery.sweeps.schedule import schedule
>>> swap_and_drop = schedule([Route.parse("1 0 2"), Route.parse("1 2")], depth=3)
>>> swap_and_drop.calls, swap_and_drop.calls_without_sharing  # both routes begin with block 1, which is run once
(7, 8)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..errors import UnsupportedEditError
from ..plans.route import Route
from ..plans.visit import Visit

Group = tuple[Visit, ...]
"""The visits that are given the same stream; most groups have one."""

DEPTH_FIRST, LAYER_MAJOR = "depth-first", "layer-major"
_MAX_RESIDENT = 8


@dataclass(frozen=True, slots=True)
class RunBlock:
    """Run a block, or parallel blocks, on the stream number `state`, and store the output as the number `result`."""

    visits: tuple[Visit, ...]
    state: int
    result: int

    @property
    def visit(self) -> Visit:
        """Return the visit of a single block."""
        (visit,) = self.visits
        return visit

    @property
    def is_whole(self) -> bool:
        """Return whether a single block runs as it is."""
        return len(self.visits) == 1 and self.visits[0].whole


@dataclass(frozen=True, slots=True)
class ReadLogits:
    """Measure the stream number `state`, which is the final stream of these routes."""

    state: int
    routes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Load a block's weights, after unloading the weights of the blocks in `evict`."""

    block: int
    evict: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One action, and the streams to release after it because no later step needs them."""

    action: RunBlock | ReadLogits | LoadWeights
    release: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps to run on each batch, in order.

    Attributes:
        depth: number of blocks of the unedited model.
        steps: block calls and measurements to run after the trunk.
        saved_states: numbers of the trunk's states that routes start from. The final state is always among them,
            because the unedited model's predictions are read from it first.
        calls_without_sharing: block calls of the trunk and all routes, if each was run separately.
        states_at_peak: the largest number of streams in memory at the same time.
        during_trunk: layer by layer only: the steps at each block while the trunk runs. The first one loads the block's
            weights; the others run after the trunk's own call of the block.
        resident_blocks: layer by layer only: the number of blocks whose weights are loaded at the same time; None if
            all are.
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
        """Return the name of the order, "depth-first" or "layer-major"."""
        return LAYER_MAJOR if self.during_trunk else DEPTH_FIRST

    @property
    def needs_final_state(self) -> bool:
        """Return whether the trunk's final state is needed after the unedited model was measured.

        It is needed if a route ends there or continues from there.
        """
        return any(
            isinstance(step.action, RunBlock | ReadLogits) and step.action.state == self.depth for step in self.steps
        )

    @property
    def all_steps(self) -> Iterator[Step]:
        """Yield the steps during the trunk, then the steps after it."""
        for steps in (*self.during_trunk, self.steps):
            yield from steps

    @property
    def calls(self) -> int:
        """Return the total number of block calls, including those of the trunk."""
        return self.depth + sum(len(step.action.visits) for step in self.all_steps if isinstance(step.action, RunBlock))

    def bytes_read(self, blocks: Sequence[int], around: int) -> int:
        """Return the bytes of offloaded weights that one batch loads.

        In depth-first order, a block is loaded for each call.

        Args:
            blocks: offloaded bytes of each block.
            around: offloaded bytes of the modules outside the blocks.
        """
        visits = self.load_order
        if not self.during_trunk:
            visits = (
                *range(self.depth),
                *(
                    visit.block
                    for step in self.steps
                    if isinstance(step.action, RunBlock)
                    for visit in step.action.visits
                ),
            )
        return sum(blocks[block] for block in visits) + around

    def bytes_in_flight(self, blocks: Sequence[int]) -> int:
        """Return the bytes of offloaded blocks that are in memory together, including the one that is prefetched.

        Args:
            blocks: offloaded bytes of each block.
        """
        return max(blocks) * ((self.resident_blocks or 0) + 1)

    @property
    def load_order(self) -> tuple[int, ...]:
        """Return the blocks in the order in which their weights are loaded (layer by layer only)."""
        return tuple(step.action.block for step in self.all_steps if isinstance(step.action, LoadWeights))


@dataclass(slots=True)
class _Node:
    """A node of the tree: the stream after one prefix of routes."""

    children: dict[Group, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    width: int = 1  # largest number of streams in memory while its subtree runs, its own stream included

    def ordered(self) -> list[tuple[Group, _Node]]:
        """Return the children with the widest last, since this node's stream is released before the last one."""
        return sorted(self.children.items(), key=lambda item: item[1].width)


def schedule(routes: Sequence[Route], depth: int, run_only: Sequence[Route] = ()) -> Schedule:
    """Schedule routes depth first, with as few block calls as sharing prefixes allows.

    Args:
        routes: the routes to run and measure, numbered in this order. A route that occurs twice is run once.
        depth: number of blocks of the model.
        run_only: routes to run as well, without measuring their final streams.
    """
    trunk, order = _build_trie(routes, depth, run_only)
    for node in reversed(order):
        widths = [child.width for _, child in node.ordered()]
        node.width = max([1, *(width + 1 for width in widths[:-1]), *(max(2, width) for width in widths[-1:])])
    steps = tuple(_steps(trunk, depth))
    saved, needed_by_routes = _saved_states(trunk, depth)
    calls_without_sharing = depth + sum(map(len, {*routes, *run_only}))
    return Schedule(depth, steps, saved, calls_without_sharing, max(len(saved), _peak(steps, needed_by_routes)))


def layer_major(
    routes: Sequence[Route], depth: int, max_resident: int = _MAX_RESIDENT, run_only: Sequence[Route] = ()
) -> Schedule:
    """Schedule routes layer by layer, so that the blocks' weights are loaded as few times as possible.

    No more blocks are resident than is useful: one for drops, two for swaps of neighbors, which go back one block.

    Args:
        routes: the routes to run and measure, numbered in this order. A route that occurs twice is run once.
        depth: number of blocks of the model.
        max_resident: the largest number of blocks whose weights may be loaded at the same time.
        run_only: routes to run as well, without measuring their final streams.

    Raises:
        UnsupportedEditError: a route has parallel blocks, which would all have to be loaded at the same time.
    """
    for route in (*routes, *run_only):
        if has_groups(route):
            raise UnsupportedEditError(
                f"{route}: parallel blocks are run together, so they cannot be measured layer by layer, which is the "
                "default if weights are offloaded; choose `schedule` depth-first"
            )
    best = _schedule_by_layer(routes, depth, 1, run_only)
    for resident_blocks in range(2, min(max_resident, depth) + 1):
        if len(best.load_order) == depth:
            break
        plan = _schedule_by_layer(routes, depth, resident_blocks, run_only)
        best = plan if len(plan.load_order) < len(best.load_order) else best
    return best


def has_groups(route: Route) -> bool:
    """Return whether a route has parallel blocks."""
    return any(visit.parallel for visit in route)


def _build_trie(routes: Sequence[Route], depth: int, run_only: Sequence[Route]) -> tuple[list[_Node], list[_Node]]:
    """Build the tree of all routes.

    Returns:
        The trunk's nodes, of which the children are where routes leave the trunk; and all nodes, parents first.
    """
    root = _Node()
    order = [root]
    for number, route in enumerate((*routes, *run_only)):
        node = root
        for group in route.groups:
            if group not in node.children:
                node.children[group] = _Node()
                order.append(node.children[group])
            node = node.children[group]
        if number < len(routes):
            node.ends.append(number)
    trunk: list[_Node] = [root]
    for block in range(depth):
        trunk.append(trunk[-1].children.pop((Visit(block),), _Node()))
    return trunk, order


def _saved_states(trunk: list[_Node], depth: int) -> tuple[frozenset[int], int]:
    """Return the trunk's states to save, and how many of them the routes need."""
    needed = {state for state, node in enumerate(trunk) if node.children or node.ends}
    return frozenset({depth, *needed}), len(needed)


def _steps(trunk: list[_Node], depth: int) -> Iterator[Step]:
    """Yield the steps of the depth-first order."""
    last_state = depth
    for trunk_state in reversed(range(depth + 1)):
        # (visits that lead to the node, its parent's state, whether to release the parent's state after it, the node)
        stack: list[tuple[Group | None, int, bool, _Node]] = [(None, trunk_state, False, trunk[trunk_state])]
        while stack:
            group, parent, is_last_child, node = stack.pop()
            state = parent
            if group is not None:
                last_state += 1
                state = last_state
                unread = () if node.children or node.ends else (state,)
                yield Step(RunBlock(group, parent, state), ((parent,) if is_last_child else ()) + unread)
            children = node.ordered()
            if node.ends:
                yield Step(ReadLogits(state, tuple(node.ends)), () if children else (state,))
            for index, (child_group, child) in reversed(list(enumerate(children))):
                stack.append((child_group, state, index == len(children) - 1, child))


def _peak(steps: Sequence[Step], alive: int) -> int:
    """Return the largest number of streams in memory during these steps, from `alive` at their beginning."""
    peak = alive
    for step in steps:
        alive += isinstance(step.action, RunBlock)
        peak = max(peak, alive)
        alive -= len(step.release)
    return peak


def _schedule_by_layer(
    routes: Sequence[Route], depth: int, resident_blocks: int, run_only: Sequence[Route]
) -> Schedule:
    """Schedule routes layer by layer, with `resident_blocks` blocks loaded at the same time."""
    trunk, _ = _build_trie(routes, depth, run_only)
    builder = _LayerByLayer(resident_blocks, depth)
    during_trunk = []
    for block in range(depth):
        builder.add_stream(block, trunk[block])
        during_trunk.append(tuple(builder.load_and_run(block)))
    builder.add_stream(depth, trunk[depth])
    saved, _ = _saved_states(trunk, depth)
    steps = tuple(builder.run_remaining())
    calls_without_sharing = depth + sum(map(len, {*routes, *run_only}))
    plan = Schedule(depth, steps, saved, calls_without_sharing, 0, tuple(during_trunk), resident_blocks)
    return replace(plan, states_at_peak=_peak_by_layer(plan))


class _LayerByLayer:
    """Builder of a layer-by-layer schedule, which goes through the tree block by block."""

    def __init__(self, resident_blocks: int, depth: int) -> None:
        self.resident_blocks = resident_blocks
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.waiting: dict[int, list[tuple[Visit, int, _Node]]] = {}  # by the block that they visit next
        self.uses: dict[int, int] = {}  # how many later steps need each stream
        self.ended: list[tuple[int, _Node]] = []
        self.last_state = depth

    def add_stream(self, state: int, node: _Node) -> None:
        """Add a stream that has been computed; its routes wait for the blocks that they visit next."""
        self.uses[state] = len(node.children) + bool(node.ends)
        if node.ends:
            self.ended.append((state, node))
        for (visit,), child in node.ordered():
            self.waiting.setdefault(visit.block, []).append((visit, state, child))

    def load_and_run(self, block: int) -> Iterator[Step]:
        """Load a block's weights, then run every waiting route through the resident blocks as far as possible."""
        if block not in self.resident:
            evicted = []
            while len(self.resident) >= self.resident_blocks:
                evicted.append(self.resident.popitem(last=False)[0])
            self.resident[block] = None
            yield Step(LoadWeights(block, tuple(evicted)))
        while ready := [number for number in self.resident if self.waiting.get(number)]:
            yield from self._run_waiting(ready[-1])

    def _run_waiting(self, block: int) -> Iterator[Step]:
        for visit, state, node in self.waiting.pop(block):
            self.last_state += 1
            unread = () if node.children or node.ends else (self.last_state,)
            yield Step(RunBlock((visit,), state, self.last_state), self._use(state) + unread)
            self.add_stream(self.last_state, node)

    def _use(self, state: int) -> tuple[int, ...]:
        """Count one use of a stream; return it if this was the last one, to be released."""
        self.uses[state] -= 1
        return () if self.uses[state] else (state,)

    def read(self) -> Iterator[Step]:
        """Measure the routes that have reached their end."""
        for state, node in self.ended:
            yield Step(ReadLogits(state, tuple(node.ends)), self._use(state))
        self.ended.clear()

    def run_remaining(self) -> Iterator[Step]:
        """Yield the steps after the trunk: go through the blocks that routes wait for, repeatedly, until none waits."""
        yield from self.read()
        block = -1
        while waiting := sorted(number for number, routes in self.waiting.items() if routes):
            block = next((number for number in waiting if number > block), waiting[0])
            yield from self.load_and_run(block)
            yield from self.read()


def _peak_by_layer(plan: Schedule) -> int:
    """Return the largest number of streams in memory at the same time, in a layer-by-layer schedule."""
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
