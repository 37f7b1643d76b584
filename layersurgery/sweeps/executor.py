"""Run a schedule on one batch: call blocks, measure final streams, release streams, load and unload weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch

from ..runtime.block_runner import BlockRunner, ForwardRecord
from .schedule import LoadWeights, ReadLogits, RunBlock, Schedule, Step

OnFraction = Callable[[float], None]


class BlockObserver(Protocol):
    """Observer that is called around every block call."""

    def trunk(self, block: int, record: ForwardRecord) -> AbstractContextManager[None]:
        """Return a context manager to enter while a block of the unedited model runs."""

    def run(self, step: RunBlock, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a block of an edited model with `call`, and return the stream after it."""


class ScheduleExecutor:
    """Runner of a schedule on one batch.

    Args:
        runner: runs the model's blocks.
        plan: the schedule.
        on_fraction: called with the fraction of the steps that are done; None if nobody needs it.
        observer: called around every block call; None if nothing is observed.

    Attributes:
        calls: number of block calls.
        peak: largest number of streams that were in memory together.
    """

    def __init__(
        self, runner: BlockRunner, plan: Schedule, on_fraction: OnFraction | None, observer: BlockObserver | None = None
    ) -> None:
        self.runner, self.plan, self.on_fraction, self.observer = runner, plan, on_fraction, observer
        self.calls, self.peak = runner.depth, 0
        self._steps_done, self._steps = 0, sum(1 for _ in plan.all_steps)
        self._load_order = iter(plan.load_order)
        next(self._load_order, None)

    @contextmanager
    def cleanup(self) -> Iterator[None]:
        """Unload all offloaded blocks when the `with` block ends, also after an exception."""
        try:
            yield
        finally:
            self.runner.offloaded.cancel_prefetch()
            self.runner.offloaded.unload(*self.runner.blocks)

    def track_peak(self, states: dict[int, torch.Tensor]) -> None:
        """Update the peak with the number of streams that are in memory."""
        self.peak = max(self.peak, len(states))

    @contextmanager
    def around_block(self, block: int, record: ForwardRecord) -> Iterator[None]:
        """Load the weights before the trunk runs a block, and run the routes that wait for this block after it."""
        steps = self.plan.during_trunk[block] if self.plan.during_trunk else ()
        self.run_steps(steps[:1], record)
        with nullcontext() if self.observer is None else self.observer.trunk(block, record):
            yield
        self.run_steps(steps[1:], record)

    def run_steps(
        self, steps: Sequence[Step], record: ForwardRecord, read: Callable[[int, Sequence[int]], None] | None = None
    ) -> None:
        """Run some steps of the schedule.

        Args:
            steps: the steps, in order.
            record: the record of the unedited model's forward; its `states` are updated.
            read: measures the stream of a number, which is the final stream of these routes.
        """
        states = record.states
        self.track_peak(states)
        for step in steps:
            match step.action:
                case LoadWeights(block, evict):
                    self._load(block, evict)
                case RunBlock(visits, state, result):
                    call = partial(self.runner.run_group, record, visits, states[state])
                    states[result] = (
                        call() if self.observer is None else self.observer.run(step.action, states[state], call)
                    )
                    self.calls += len(visits)
                    self.track_peak(states)
                case ReadLogits(state, routes):
                    assert read is not None
                    read(state, routes)
            for state in step.release:
                del states[state]
            self._steps_done += 1
            if self.on_fraction is not None and not isinstance(step.action, LoadWeights):
                self.on_fraction(self._steps_done / self._steps)

    def _load(self, block: int, evict: Sequence[int]) -> None:
        """Unload the evicted blocks, load a block's weights, and prefetch those of the block that is loaded next."""
        offloaded, blocks = self.runner.offloaded, self.runner.blocks
        offloaded.unload(*(blocks[number] for number in evict))
        offloaded.load(blocks[block])
        if (next_block := next(self._load_order, None)) is not None:
            offloaded.prefetch(blocks[next_block])
