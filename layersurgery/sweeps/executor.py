"""Going through a schedule upon one batch: block calls and readouts, streams and weights that come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch

from ..runtime.block_runner import Stack, Tape
from .schedule import Bring, Read, Run, Schedule, Step

Tick = Callable[[float], None]


class Watch(Protocol):
    """Somebody who looks on."""

    def trunk(self, block: int, tape: Tape) -> AbstractContextManager[None]:
        """While a block of the unedited model runs."""

    def run(self, step: Run, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a block of an edited model, by `call`."""


class Walk:
    """Goes through a schedule: block calls, readouts, and weights that come and go.

    Attributes:
        calls: of blocks.
        peak: streams that were alive together.
    """

    def __init__(self, stack: Stack, plan: Schedule, tick: Tick | None, watch: Watch | None = None) -> None:
        self.stack, self.plan, self.tick, self.watch = stack, plan, tick, watch
        self.calls, self.peak = stack.depth, 0
        self._done, self._steps = 0, sum(1 for _ in plan.all_steps)
        self._brought = iter(plan.brought)
        next(self._brought, None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, blocks come and go; at the end all of them are away that were."""
        try:
            yield
        finally:
            self.stack.residence.expect_nobody()
            self.stack.residence.let_go(*self.stack.blocks)

    def see(self, states: dict[int, torch.Tensor]) -> None:
        """Count the streams that are alive."""
        self.peak = max(self.peak, len(states))

    @contextmanager
    def beside(self, block: int, tape: Tape) -> Iterator[None]:
        """While the trunk goes through a block: what has it brought in before, and the routes that go through it afterwards."""
        steps = self.plan.during[block] if self.plan.during else ()
        self.through(steps[:1], tape)
        with nullcontext() if self.watch is None else self.watch.trunk(block, tape):
            yield
        self.through(steps[1:], tape)

    def through(self, steps: Sequence[Step], tape: Tape, read: Callable[[int, Sequence[int]], None] | None = None) -> None:
        """Do some steps."""
        states = tape.states
        self.see(states)
        for step in steps:
            match step.do:
                case Bring(block, instead_of):
                    self._bring(block, instead_of)
                case Run(visit, state, result):
                    call = partial(self.stack.run, tape, visit, states[state])
                    states[result] = call() if self.watch is None else self.watch.run(step.do, states[state], call)
                    self.calls += 1
                    self.see(states)
                case Read(state, routes):
                    assert read is not None
                    read(state, routes)
            for state in step.free:
                del states[state]
            self._done += 1
            if self.tick is not None and not isinstance(step.do, Bring):
                self.tick(self._done / self._steps)

    def _bring(self, block: int, instead_of: Sequence[int]) -> None:
        home, blocks = self.stack.residence, self.stack.blocks
        home.let_go(*(blocks[number] for number in instead_of))
        home.bring(blocks[block])
        if (following := next(self._brought, None)) is not None:
            home.expect(blocks[following])
