"""Observe a model's blocks while they run: which blocks, for which signals, and when.

The signals are attention to previous tokens, norms and similarity of contributions, the change of the stream, its size
compared with what is added to it, and its similarity between all depths.

A contribution is what a branch or a whole block adds to the residual stream. Every signal is summed by sequence at
once. Activations are kept for two neighboring blocks at most, which the similarity of swapped blocks needs; only the
similarity of the stream between all depths keeps the stream of the batch at each depth. A swap runs block l + 1 on the
stream before block l, then block l. Both are the first steps of routes that a sweep runs in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..errors import MeasurementError, UnsupportedEditError
from ..metrics.aggregation import Array
from ..plans.route import Route
from ..plans.visit import Visit
from ..runtime.block_runner import BlockRunner, ForwardRecord
from ..runtime.contributions import (
    BRANCHES,
    BlockContributions,
    capture_contributions,
    find_contributions,
    reads_are_mean_free,
)
from .batch_observation import BatchObservation
from .quantities import (
    ATTENTION,
    BRANCH_CHANGE,
    CHANGE,
    CKA,
    COSINE,
    COUNTS,
    NORMS,
    OF_PAIRS,
    PARTS,
    SIMILARITY,
    SIMILARITY_KINDS,
    STREAM,
    Observed,
    Quantities,
    Quantity,
)
from .schedule import RunBlock, has_groups

_CONTRIBUTIONS = frozenset({NORMS, SIMILARITY, STREAM, BRANCH_CHANGE})
_OF_STREAM = frozenset({CHANGE, BRANCH_CHANGE})  # compare the stream as it is, with its mean over channels


class Observer:
    """Observer that measures signals on a model's blocks.

    Args:
        runner: runs the model's blocks.
        observed: what to observe.

    Attributes:
        contributions: for each block, where the contributions of its branches can be captured.
        reads_are_mean_free: whether the mean over channels is removed from contributions and from the stream. It is
            removed if everything that reads the stream removes it too (LayerNorm).
        quantities: the measured means. Means that a block does not have are not included.
        skipped: reasons by name, for each mean that cannot be measured.
    """

    def __init__(self, runner: BlockRunner, observed: Observed) -> None:
        self.runner, self.observed, self.signals = runner, observed, frozenset(observed.signals)
        self.observed_route = Route.identity(runner.depth) if observed.route is None else observed.route
        if has_groups(self.observed_route):
            raise UnsupportedEditError(
                f"{self.observed_route}: what single blocks change is not defined for parallel blocks; observe a route "
                "without them"
            )
        assert observed.route is None or (self.signals == {CHANGE} and observed.spans == 1)
        self.contributions = (
            find_contributions(runner, check_attention=ATTENTION in self.signals)
            if self.signals & {ATTENTION, *_CONTRIBUTIONS}
            else [BlockContributions((), (), "", False)] * runner.depth
        )
        self.reads_are_mean_free = not self.signals <= _OF_STREAM and reads_are_mean_free(runner)
        self.skipped: dict[str, str] = {}
        self.quantities = Quantities(self._find_quantities())
        self._batch: BatchObservation | None = None

    @property
    def size(self) -> int:
        """Return how many numbers are stored for each sequence."""
        return self.quantities.size

    @property
    def names(self) -> list[str]:
        """Return a description of each number that is stored for a sequence."""
        return self.quantities.names

    @property
    def routes(self) -> list[Route]:
        """Return the routes to run in addition to the unedited model.

        They are the observed route; or, for the similarity, each swap of neighboring blocks up to the second one of the
        two.
        """
        if self.observed_route != Route.identity(self.runner.depth):
            return [self.observed_route]
        if SIMILARITY not in self.signals:
            return []
        return [
            Route((*map(Visit, range(layer)), Visit(layer + 1), Visit(layer))) for layer in range(self.runner.depth - 1)
        ]

    def _find_quantities(self) -> Iterator[Quantity]:
        """Yield what can be measured, and note in `skipped` why the rest cannot."""
        for layer, contributions in enumerate(self.contributions):
            if ATTENTION in self.signals:
                if contributions.reads_attention:
                    yield Quantity(ATTENTION, layer, "attention", "attention_prev5", "has_five_previous")
                    yield Quantity(ATTENTION, layer, "attention", "attention_prev5_mean", "pairs")
                else:
                    mixer = contributions.mixer_names or "the block"
                    reason = contributions.attention_error or f"{mixer} attends to no tokens by softmax"
                    self.skipped[f"attention of block {layer}"] = reason
            if NORMS in self.signals:
                for branch in BRANCHES:
                    if contributions.has(branch):
                        yield Quantity(NORMS, layer, branch, f"{branch}_norm", "tokens")
                    else:
                        reason = contributions.error or f"the block has no {branch}"
                        self.skipped[f"{branch} norm of block {layer}"] = reason
        yield from self._find_stream_quantities()
        if SIMILARITY in self.signals:
            if self.runner.depth < 2:
                self.skipped["similarity"] = "the model has only one block, so there is no neighbor to swap it with"
            for layer in range(self.runner.depth - 1):
                for part in PARTS:
                    reason = self._not_comparable(layer, part)
                    if reason:
                        self.skipped[f"{part} similarity of blocks {layer} and {layer + 1}"] = reason
                    else:
                        yield from (Quantity(SIMILARITY, layer, part, kind, "tokens") for kind in SIMILARITY_KINDS)

        if BRANCH_CHANGE in self.signals:
            for layer, contributions in enumerate(self.contributions):
                for branch in BRANCHES:
                    if contributions.has(branch):
                        yield Quantity(BRANCH_CHANGE, layer, branch, "block_influence", "tokens")
                        yield Quantity(BRANCH_CHANGE, layer, branch, "angular_distance", "tokens")
                        yield Quantity(BRANCH_CHANGE, layer, branch, "angular_distance_last", "last_tokens")
                    else:
                        reason = contributions.error or f"the block has no {branch}"
                        self.skipped[f"change of the stream by the {branch} of block {layer}"] = reason
        if CHANGE in self.signals:
            visited = self.observed_route.blocks
            for position, layer in enumerate(visited):
                yield Quantity(CHANGE, layer, "1", "block_influence", "tokens")
                for span in range(1, min(self.observed.spans, len(visited) - position) + 1):
                    yield Quantity(CHANGE, layer, str(span), "angular_distance", "tokens")
                    yield Quantity(CHANGE, layer, str(span), "angular_distance_last", "last_tokens")

    def _find_stream_quantities(self) -> Iterator[Quantity]:
        """Yield what can be measured of the stream, and note in `skipped` why the rest cannot."""
        states = range(self.runner.depth + 1)
        if STREAM in self.signals:
            for state in states:
                yield Quantity(STREAM, state, "stream", "stream_norm", "tokens")
                yield Quantity(STREAM, state, "stream", "first_token_norm", "first_tokens")
                yield Quantity(STREAM, state, "stream", "stream_variance", "tokens")
            for layer, contributions in enumerate(self.contributions):
                for branch in BRANCHES:
                    if contributions.has(branch):
                        yield Quantity(STREAM, layer, branch, f"{branch}_to_stream", "tokens")
                        yield Quantity(STREAM, layer, branch, f"{branch}_cosine", "tokens")
                    else:
                        reason = contributions.error or f"the block has no {branch}"
                        self.skipped[f"{branch} contribution of block {layer}"] = reason
        for signal, name, count in (
            (CKA, "hsic", "has_four_tokens"),
            (CKA, "hsic_without_first", "has_five_tokens"),
            (COSINE, "cosine", "tokens"),
        ):
            if signal in self.signals:
                yield from (Quantity(signal, one, str(two), name, count) for one in states for two in states[one:])

    def _not_comparable(self, layer: int, part: str) -> str:
        """Return why a part of two neighboring blocks cannot be compared; empty if it can."""
        for number in (layer, layer + 1):
            contributions = self.contributions[number]
            if part in BRANCHES and not contributions.has(part):
                return contributions.error or f"one of the blocks has no {part}"
        return ""

    @contextmanager
    def observing(self, mask: torch.Tensor) -> Iterator[None]:
        """Observe one batch while the `with` block runs.

        Args:
            mask: 1 for a token and 0 for padding, (sequences, length).
        """
        self._batch = BatchObservation(self.observed, self.quantities, mask, mean_free=self.reads_are_mean_free)
        try:
            yield
        finally:
            self._batch = None

    @contextmanager
    def _capturing(self, number: int, *, attention: bool = False) -> Iterator[None]:
        """Capture contributions of a block, and attention weights if wanted, while the `with` block runs it.

        The block is changed for this call only: a view of it with a skipped branch, which a sweep may make between two
        calls, must not capture.
        """
        batch, contributions = self._current_batch(), self.contributions[number]
        reads = attention and ATTENTION in self.signals and contributions.reads_attention
        on_attention = partial(batch.add_attention, number) if reads else None
        points = [
            (point, partial(batch.capture, point.branch, point.scale))
            for point in contributions.capture_points
            if self.signals & _CONTRIBUTIONS
        ]
        block, shape = self.runner.blocks[number], batch.is_token.shape
        with capture_contributions(block, points, contributions.mixers, on_attention, shape):
            yield

    @contextmanager
    def trunk(self, block: int, record: ForwardRecord) -> Iterator[None]:
        """Observe a block of the unedited model while the `with` block runs it."""
        batch = self._current_batch()
        with self._capturing(block, attention=True):
            yield
        assert record.last_block is not None
        batch.add_unedited(block, *record.last_block, parallel=bool(self.runner.anatomy.parts(block).parallel))
        if block == self.runner.depth - 1:
            batch.add_final_stream(self.runner.depth, record.last_block[1])

    def run(self, step: RunBlock, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a block of an edited model with `call`, observing it if needed, and return the stream after it."""
        batch = self._current_batch()
        if CHANGE in self.signals and not self.observed_route.is_identity(self.runner.depth):
            after = call()
            batch.add_change(step.visit.block, stream, after)
            return after
        is_first = step.state == step.visit.block - 1
        is_second = batch.second_of_swap.get(step.state) == step.visit.block
        if SIMILARITY not in self.signals or not step.visit.whole or not (is_first or is_second):
            return call()
        with self._capturing(step.visit.block):
            after = call()
        batch.add_swapped(step, stream, after)
        return after

    def sums(self) -> Array:
        """Return the counts and sums of the observed batch, (sequences, size), float64.

        Raises:
            MeasurementError: a quantity was not captured.
        """
        sums = self._current_batch().sums
        by_device: dict[torch.device, list[int]] = {}
        for column, quantity in enumerate(self.quantities, len(COUNTS)):
            if column not in sums:
                remedy = (
                    "load the model with attn_implementation='eager'"
                    if quantity.signal == ATTENTION
                    else f"measure other signals than {quantity.signal}"
                )
                raise MeasurementError(
                    f"block {quantity.layer}: {quantity.name} was not captured, because its {quantity.part} ran "
                    f"in another way than in the test run on seven tokens; {remedy}"
                )
        for column in range(self.quantities.size):
            by_device.setdefault(sums[column].device, []).append(column)
        observed = torch.empty(len(sums[0]), self.quantities.size, dtype=torch.float64)
        for columns in by_device.values():  # one copy from each device
            observed[:, columns] = torch.stack([sums[column] for column in columns], 1).cpu()
        return observed.numpy()

    def _current_batch(self) -> BatchObservation:
        assert self._batch is not None, "no batch is being observed"
        return self._batch

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of activations that are kept for each token, at their largest number."""
        changes = self.observed.spans + 2 if CHANGE in self.signals else 0
        of_branches = {SIMILARITY: 9, STREAM: 6, BRANCH_CHANGE: 6, NORMS: 3}
        contributions = max((of_branches.get(signal, 0) for signal in self.signals), default=0)
        states = (self.runner.depth + 1) * bool(self.signals & {*OF_PAIRS})
        itemsize = next(self.runner.model.parameters()).element_size()
        return self.runner.width * (4 * (changes + contributions) + itemsize * states)
