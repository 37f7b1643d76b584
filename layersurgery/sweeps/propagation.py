"""Measure how far an edit reaches: how much what later blocks add to the stream changes.

A sweep runs the later blocks of every edited model in any case. What the attention and the MLP of such a block add, c',
is compared with what the same block adds in the unedited model at the same token, c: ||c' - c|| / ||c||, as in "Do
Language Models Use Their Depth Efficiently?" (arXiv 2505.13898), which takes the largest value over all tokens.

The unedited contributions of a block are kept until the last edited model has run the block. Layer by layer, edited
models run a block right after the unedited model, so that only a few blocks' contributions are in memory; depth first,
those of all blocks are. `schedule_for_propagation` takes the order that keeps less. The digits are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch

from ..errors import MeasurementError, PlanError, UnsupportedEditError
from ..metrics.aggregation import Array
from ..plans.route import Route
from ..plans.variants import Variant
from ..plans.visit import Branch, Visit
from ..runtime.block_runner import BlockRunner, ForwardRecord
from ..runtime.contributions import BRANCHES, CapturePoint, capture_contributions, find_contributions
from ..runtime.inputs import has_next_token
from .schedule import Group, RunBlock, Schedule, has_groups, layer_major, schedule

_WORKING_STREAMS = 3  # the differences of both branches, and a contribution in float32
_TOKENS = 0  # the column that counts tokens
_OF_CHANGE = 2  # columns of each change: the sum and the largest value


@dataclass(frozen=True, slots=True)
class Response:
    """Compare what one branch of a later block adds in an edited model with what it adds in the unedited one.

    Attributes:
        block: the block.
        position: its position in the edited model's route.
        part: "attention" or "mlp".
        column: the column of the sum of changes; the next column has the largest change.
    """

    block: int
    position: int
    part: Branch
    column: int


class Propagation:
    """Observer that compares what later blocks of edited models add with what they add in the unedited model.

    A later block is one that an edited model runs as a whole after the first change of its route. A block of which the
    edit skips a branch is part of the edit, so its other branch is not compared. A block that is visited several times
    is compared at each visit.

    Args:
        runner: runs the model's blocks.
        variants: the edited models.

    Attributes:
        size: how many numbers are stored for each sequence: the count of tokens, then for each change its sum and its
            largest value.
        skipped: reasons by name, for branches that cannot be compared.
        reads_are_mean_free: False: contributions are compared as they are, with their mean over channels.
        routes: no routes are run in addition to those of the sweep.

    Raises:
        PlanError: none of the edited models runs a later block.
        UnsupportedEditError: the contributions of no later block can be captured.
    """

    reads_are_mean_free: bool = False
    routes: tuple[Route, ...] = ()

    def __init__(self, runner: BlockRunner, variants: Sequence[Variant]) -> None:
        self.runner = runner
        # Streams are numbered in the order of the variants, the trunk's first: a schedule's own numbers depend on its
        # order, and batches that are measured in different orders are added up.
        self._streams: dict[tuple[int, Group], int] = {
            (block, (Visit(block),)): block + 1 for block in range(runner.depth)
        }
        self._plans: dict[int, str] = {}
        for variant in variants:
            for stream in self._path(variant.route):
                self._plans.setdefault(stream, variant.plan)
        later = {
            stream: group[0].block
            for (_, group), stream in self._streams.items()
            if stream > runner.depth and len(group) == 1 and group[0].whole
        }
        self._uses = Counter(later.values())
        if not later:
            raise PlanError(
                "propagation compares what blocks add after an edit, and none of these edits runs a whole block after "
                "its first change; leave `propagation` out"
            )
        self.contributions = find_contributions(runner, check_attention=False)
        self.skipped = self._find_skipped()
        self._columns: dict[int, dict[Branch, int]] = {}
        self.size = _TOKENS + 1
        for stream, block in later.items():
            self._columns[stream] = {}
            for branch in BRANCHES:
                if self.contributions[block].has(branch):
                    self._columns[stream][branch] = self.size
                    self.size += _OF_CHANGE
        if self.size == _TOKENS + 1:
            what, reason = next(iter(self.skipped.items()))
            raise UnsupportedEditError(f"{what} cannot be measured, nor any other: {reason}; leave `propagation` out")
        self._batch: _Batch | None = None

    def _path(self, route: Route) -> Iterator[int]:
        """Yield the numbers of the streams after each group of visits of a route."""
        stream = 0
        for group in route.groups:
            stream = self._streams.setdefault((stream, group), len(self._streams) + 1)
            yield stream

    def _find_skipped(self) -> dict[str, str]:
        """Return why branches of later blocks cannot be compared, by what they are."""
        reasons = [
            (self.contributions[block].error or f"the block has no {branch}", branch, block)
            for branch in BRANCHES
            for block in sorted(self._uses)
            if not self.contributions[block].has(branch)
        ]
        skipped = {}
        for (reason, branch), entries in groupby(sorted(reasons), key=lambda entry: entry[:2]):
            blocks = [str(block) for _, _, block in entries]
            skipped[f"propagation to {branch} of block{'s'[: len(blocks) != 1]} {', '.join(blocks)}"] = reason
        return skipped

    def responses(self, route: Route) -> Iterator[Response]:
        """Yield what is compared along one of the routes, in the order in which its blocks run."""
        position = 0
        for group, stream in zip(route.groups, self._path(route), strict=True):
            for branch, column in self._columns.get(stream, {}).items():
                yield Response(group[0].block, position, branch, column)
            position += len(group)

    @property
    def names(self) -> list[str]:
        """Return a description of each number that is stored for a sequence."""
        names = ["tokens"] * self.size
        for (_, group), stream in self._streams.items():
            for branch, column in self._columns.get(stream, {}).items():
                of = f"propagation of '{self._plans[stream]}' to {branch} of block {group[0].block}"
                names[column : column + _OF_CHANGE] = [of] * _OF_CHANGE
        return names

    @contextmanager
    def observing(self, mask: torch.Tensor) -> Iterator[None]:
        """Observe one batch while the `with` block runs.

        Args:
            mask: 1 for a token and 0 for padding, (sequences, length).
        """
        # A sequence of a single token has no prediction, so it is not part of any mean.
        is_token = mask.bool() & has_next_token(mask).any(-1, keepdim=True)
        self._batch = _Batch(is_token, self._uses.copy())
        try:
            yield
        finally:
            self._batch = None

    @contextmanager
    def trunk(self, block: int, record: ForwardRecord) -> Iterator[None]:  # noqa: ARG002 - given to every observer
        """Keep what a block of the unedited model adds while the `with` block runs it, if a later call needs it."""
        batch = self._current_batch()
        if not self._uses[block]:
            yield
            return
        added: dict[Branch, torch.Tensor] = {}

        def add(point: CapturePoint, value: torch.Tensor) -> None:
            if point.branch in added:
                added[point.branch] += value
            else:  # a copy, since the model may change the original in place
                added[point.branch] = value.clone()

        with self._capturing(block, add):
            yield
        batch.unedited[block] = {branch: (value, value.norm(dim=-1)) for branch, value in added.items()}

    def run(self, step: RunBlock, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        """Run a block of an edited model with `call`, compare what it adds, and return the stream after it."""
        batch = self._current_batch()
        number = self._streams[batch.numbers.get(step.state, step.state), step.visits]
        batch.numbers[step.result] = number
        if number not in self._columns:  # a view of the block, with a skipped branch, or parallel blocks
            return call()
        block = step.visit.block
        unedited = batch.take(block)
        differences: dict[Branch, torch.Tensor] = {}

        def add(point: CapturePoint, value: torch.Tensor) -> None:
            if point.branch in differences:
                differences[point.branch] += value
            else:
                differences[point.branch] = torch.sub(value, unedited[point.branch][0])

        with self._capturing(block, add):
            after = call()
        if differences:
            changes = [differences[branch].norm(dim=-1) / unedited[branch][1] for branch in self._columns[number]]
            batch.add(number, torch.stack(changes))
        return after

    @contextmanager
    def _capturing(self, block: int, add: Callable[[CapturePoint, torch.Tensor], None]) -> Iterator[None]:
        """Give the scaled outputs of a block's capture points to a function while the `with` block runs the block.

        The wrappers exist only during this call, so that no view of a block, which is made later, has copies of them.
        """
        points = self.contributions[block].capture_points
        seen: Counter[str] = Counter()

        def receive(point: CapturePoint) -> Callable[[torch.Tensor], None]:
            def on_value(value: torch.Tensor) -> None:
                seen[point.path] += 1
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                add(point, value if point.scale == 1 else value * point.scale)

            return on_value

        shape = self._current_batch().is_token.shape
        slots = [(point, receive(point)) for point in points]
        with capture_contributions(self.runner.blocks[block], slots, (), None, shape):
            yield
        for point in points:
            if seen[point.path] != 1:
                raise MeasurementError(
                    f"block {block}: {point.path} ran {seen[point.path]} times for this text, and once in the test run "
                    f"on seven tokens, so what its {point.branch} adds is not known; leave `propagation` out"
                )

    def sums(self) -> Array:
        """Return the counts, sums and largest values of the observed batch, (sequences, size), float64."""
        batch = self._current_batch()
        results = [batch.changes[stream] for stream, columns in self._columns.items() if columns]
        device = results[0].device
        tokens = batch.is_token.sum(-1, keepdim=True).to(device, torch.float64)
        observed: Array = torch.cat([tokens, *(result.to(device) for result in results)], 1).cpu().numpy()
        return observed

    def _current_batch(self) -> _Batch:
        assert self._batch is not None, "no batch is being observed"
        return self._batch


@dataclass(slots=True)
class _Batch:
    """Hold the batch that is being observed.

    Attributes:
        is_token: True for real tokens of sequences that have a prediction, (sequences, length).
        uses: how many later calls need what each block adds in the unedited model.
        unedited: what blocks add in the unedited model, and its norms, by block and branch, as long as it is needed.
        numbers: `Propagation`'s numbers of the schedule's streams; the trunk's have the same number in both.
        changes: for each later call, the sum and the largest value of each branch's changes over a sequence,
            (sequences, 2 for each branch), float64.
    """

    is_token: torch.Tensor
    uses: Counter[int]
    unedited: dict[int, dict[Branch, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    changes: dict[int, torch.Tensor] = field(default_factory=dict)
    _masks: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def take(self, block: int) -> dict[Branch, tuple[torch.Tensor, torch.Tensor]]:
        """Return what a block adds in the unedited model, and forget it if this is the last use."""
        self.uses[block] -= 1
        return self.unedited[block] if self.uses[block] else self.unedited.pop(block)

    def add(self, number: int, changes: torch.Tensor) -> None:
        """Add the changes at all tokens, (branches, sequences, length), of the call that gives this stream."""
        device = changes.device
        if device not in self._masks:  # copied there once, since each copy makes the CPU wait for the GPU
            self._masks[device] = self.is_token.to(device)
        changes = torch.where(self._masks[device], changes.double(), 0)
        # Sum each sequence separately, so that its digits do not depend on the other sequences in the batch.
        summed = torch.stack([of_sequence.sum(-1) for of_sequence in changes.unbind(1)])
        self.changes[number] = torch.stack([summed, changes.amax(-1).T], -1).flatten(1)


def propagation_bytes(plan: Schedule, width: int) -> int:
    """Return the bytes of contributions, in float32, that are kept for each token in addition to the streams.

    Args:
        plan: the schedule.
        width: number of channels of the stream.

    Example:
        >>> from layersurgery.plans.variants import family
        >>> from layersurgery.sweeps.propagation import propagation_bytes
        >>> from layersurgery.sweeps.schedule import layer_major, schedule
        >>> routes = [variant.route for variant in family("drop", 30)]
        >>> propagation_bytes(schedule(routes, 30), 1), propagation_bytes(layer_major(routes, 30), 1)
        (244, 20)
    """
    calls = [step.action for step in plan.all_steps if isinstance(step.action, RunBlock)]
    left = Counter(call.visit.block for call in calls if call.is_whole)
    kept = peak = 0
    for block in range(plan.depth):
        kept += left[block] > 0
        peak = max(peak, kept)
        for step in plan.during_trunk[block] if plan.during_trunk else ():
            if isinstance(step.action, RunBlock) and step.action.is_whole:
                left[step.action.visit.block] -= 1
                kept -= not left[step.action.visit.block]
    return 4 * width * (len(BRANCHES) * peak + _WORKING_STREAMS)


def schedule_for_propagation(routes: Sequence[Route], depth: int) -> Schedule:
    """Schedule routes of a model whose weights are in memory, in the order that needs fewer streams.

    Args:
        routes: the routes.
        depth: number of blocks of the model.

    Example:
        >>> from layersurgery.plans.variants import family
        >>> from layersurgery.sweeps.propagation import schedule_for_propagation
        >>> [
        ...     schedule_for_propagation([variant.route for variant in family(name, 30)], 30).name
        ...     for name in ("drop", "swap-pairs")
        ... ]
        ['layer-major', 'depth-first']
    """
    if any(map(has_groups, routes)):
        return schedule(routes, depth)
    plans = schedule(routes, depth), layer_major(routes, depth, 2)
    return min(plans, key=lambda plan: 4 * plan.states_at_peak + propagation_bytes(plan, 1))


def count_columns(plan: Schedule) -> int:
    """Return how many numbers propagation stores for a sequence at most: two for each branch of each later call."""
    calls = sum(isinstance(step.action, RunBlock) and step.action.is_whole for step in plan.all_steps)
    return _TOKENS + 1 + _OF_CHANGE * len(BRANCHES) * calls
