"""Going through a schedule upon one batch: block calls and readouts, streams and weights that come and go."""

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
    """Somebody who looks on."""

    def trunk(self, block: int, record: ForwardRecord) -> AbstractContextManager[None]:
        """While a block of the unedited model runs."""

    def run(self, step: RunBlock, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a block of an edited model, by `call`."""


class ScheduleExecutor:
    """Goes through a schedule: block calls, readouts, and weights that come and go.

    Attributes:
        calls: of blocks.
        peak: streams that were alive together.
    """

    def __init__(
        self, runner: BlockRunner, plan: Schedule, on_fraction: OnFraction | None, observer: BlockObserver | None = None
    ) -> None:
        self.runner, self.plan, self.on_fraction, self.observer = runner, plan, on_fraction, observer
        self.calls, self.peak = runner.depth, 0
        self._done, self._steps = 0, sum(1 for _ in plan.all_steps)
        self._load_order = iter(plan.load_order)
        next(self._load_order, None)

    @contextmanager
    def cleanup(self) -> Iterator[None]:
        """Inside, blocks come and go; at the end all of them are away that were."""
        try:
            yield
        finally:
            self.runner.offloaded.cancel_prefetch()
            self.runner.offloaded.unload(*self.runner.blocks)

    def track_peak(self, states: dict[int, torch.Tensor]) -> None:
        """Count the streams that are alive."""
        self.peak = max(self.peak, len(states))

    @contextmanager
    def around_block(self, block: int, record: ForwardRecord) -> Iterator[None]:
        """While the trunk goes through a block: what has it brought in before, and the routes that go through it afterwards."""
        steps = self.plan.during_trunk[block] if self.plan.during_trunk else ()
        self.run_steps(steps[:1], record)
        with nullcontext() if self.observer is None else self.observer.trunk(block, record):
            yield
        self.run_steps(steps[1:], record)

    def run_steps(
        self, steps: Sequence[Step], record: ForwardRecord, read: Callable[[int, Sequence[int]], None] | None = None
    ) -> None:
        """Do some steps."""
        states = record.states
        self.track_peak(states)
        for step in steps:
            match step.action:
                case LoadWeights(block, instead_of):
                    self._load(block, instead_of)
                case RunBlock(visit, state, result):
                    call = partial(self.runner.run, record, visit, states[state])
                    states[result] = (
                        call() if self.observer is None else self.observer.run(step.action, states[state], call)
                    )
                    self.calls += 1
                    self.track_peak(states)
                case ReadLogits(state, routes):
                    assert read is not None
                    read(state, routes)
            for state in step.release:
                del states[state]
            self._done += 1
            if self.on_fraction is not None and not isinstance(step.action, LoadWeights):
                self.on_fraction(self._done / self._steps)

    def _load(self, block: int, instead_of: Sequence[int]) -> None:
        home, blocks = self.runner.offloaded, self.runner.blocks
        home.unload(*(blocks[number] for number in instead_of))
        home.load(blocks[block])
        if (following := next(self._load_order, None)) is not None:
            home.prefetch(blocks[following])
