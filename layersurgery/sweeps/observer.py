"""Measure signals on a model's blocks while they run.

The signals are attention to previous tokens, norms and similarity of contributions, and the change of the stream.

A contribution is what a branch or a whole block adds to the residual stream. Every signal is summed by sequence at
once. Activations are kept for two neighboring blocks at most, which the similarity of swapped blocks needs. A swap runs
block l + 1 on the stream before block l, then block l. Both are the first steps of routes that a sweep runs in any
case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from ..errors import MeasurementError
from ..metrics.aggregation import Array
from ..plans.route import Route, Visit
from ..runtime.attention_weights import REACH, PreviousTokenAttention
from ..runtime.block_runner import BlockRunner, ForwardRecord
from ..runtime.contributions import (
    BRANCHES,
    BlockContributions,
    capture_contributions,
    find_contributions,
    reads_are_mean_free,
)
from ..runtime.inputs import has_next_token
from ..runtime.residual_change import SpanDistances, angular_distance, block_influence
from .schedule import RunBlock

ATTENTION, NORMS, SIMILARITY, CHANGE = "attention", "norms", "similarity", "change"
SIGNALS = (ATTENTION, NORMS, SIMILARITY)
PARTS = (*BRANCHES, "block")
SIMILARITY_KINDS = ("self", "index", "adjacent")
COUNTS = ("tokens", "has_five_previous", "pairs", "last_tokens")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measured mean: a column of sums, and the column that counts the summed values.

    Attributes:
        signal: the signal that it belongs to.
        layer: the block; for a swap, the first of the two blocks.
        part: "attention", "mlp" or "block"; for a change of the stream, the number of consecutive blocks, as text.
        name: the column of the table.
        count: what is counted, one of `COUNTS`: real tokens ("tokens"), tokens with at least five previous tokens
            ("has_five_previous"), pairs of a token and one of its five previous tokens ("pairs"), or last tokens of
            sequences ("last_tokens").
    """

    signal: str
    layer: int
    part: str
    name: str
    count: str


@dataclass(frozen=True, slots=True)
class Observed:
    """Choice of what is observed on a model's blocks.

    Attributes:
        signals: the signals to measure, some of `SIGNALS`, or only "change" (of the stream).
        spans: for "change": the largest number of consecutive blocks.
        route: for "change": the route to observe, which visits no block twice; the unedited model's if not given.
    """

    signals: Collection[str]
    spans: int = 1
    route: Route | None = None


class Observer:
    """Observer that measures signals on a model's blocks.

    Args:
        runner: runs the model's blocks.
        observed: what to observe.

    Attributes:
        contributions: for each block, where the contributions of its branches can be captured.
        reads_are_mean_free: whether the mean over channels is removed from contributions. It is removed if everything
            that reads the stream removes it too (LayerNorm).
        quantities: the measured means, in the order of their sums. Means that a block does not have are not included.
        skipped: reasons by name, for each mean that cannot be measured.
    """

    def __init__(self, runner: BlockRunner, observed: Observed) -> None:
        self.runner, self.signals, self.spans = runner, frozenset(observed.signals), observed.spans
        self.observed_route = Route.identity(runner.depth) if observed.route is None else observed.route
        assert observed.route is None or (self.signals == {CHANGE} and observed.spans == 1)
        only_change = self.signals <= {CHANGE}  # the change of the stream needs no contributions of branches
        self.contributions = (
            [BlockContributions((), (), "", False)] * runner.depth
            if only_change
            else find_contributions(runner, check_attention=ATTENTION in self.signals)
        )
        self.reads_are_mean_free = not only_change and reads_are_mean_free(runner)
        self.skipped: dict[str, str] = {}
        self.quantities = tuple(self._find_quantities())
        self._columns = {(q.layer, q.part, q.name): column for column, q in enumerate(self.quantities, len(COUNTS))}
        self._batch: _BatchObservation | None = None

    @property
    def size(self) -> int:
        """Return how many numbers are stored for each sequence: the counts, and a sum for each quantity."""
        return len(COUNTS) + len(self.quantities)

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

        if CHANGE in self.signals:
            visited = self.observed_route.blocks
            for position, layer in enumerate(visited):
                yield Quantity(CHANGE, layer, "1", "block_influence", "tokens")
                for span in range(1, min(self.spans, len(visited) - position) + 1):
                    yield Quantity(CHANGE, layer, str(span), "angular_distance", "tokens")
                    yield Quantity(CHANGE, layer, str(span), "angular_distance_last", "last_tokens")

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
        batch = self._batch = _BatchObservation(self, mask)
        try:
            with ExitStack() as contexts:
                for number, block in enumerate(self.runner.blocks):
                    contributions = self.contributions[number]
                    on_attention = (
                        partial(batch.add_attention, number)
                        if ATTENTION in self.signals and contributions.reads_attention
                        else None
                    )
                    points = [
                        (point, partial(batch.capture, point.branch, point.scale))
                        for point in contributions.capture_points
                    ]
                    needed = points if self.signals & {NORMS, SIMILARITY} else []
                    contexts.enter_context(
                        capture_contributions(block, needed, contributions.mixers, on_attention, batch.shape)
                    )
                yield
        finally:
            self._batch = None

    @contextmanager
    def trunk(self, block: int, record: ForwardRecord) -> Iterator[None]:
        """Observe a block of the unedited model while the `with` block runs it."""
        batch = self._current_batch()
        with batch.capturing(attention=True):
            yield
        assert record.last_block is not None
        batch.add_unedited(block, *record.last_block)

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
        with batch.capturing():
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
        for column in range(self.size):
            by_device.setdefault(sums[column].device, []).append(column)
        observed = torch.empty(len(sums[0]), self.size, dtype=torch.float64)
        for columns in by_device.values():  # one copy from each device
            observed[:, columns] = torch.stack([sums[column] for column in columns], 1).cpu()
        return observed.numpy()

    def _current_batch(self) -> _BatchObservation:
        assert self._batch is not None, "no batch is being observed"
        return self._batch

    @property
    def names(self) -> list[str]:
        """Return a description of each number that is stored for a sequence."""
        return [
            *COUNTS,
            *(f"{quantity.part} {quantity.name} of block {quantity.layer}" for quantity in self.quantities),
        ]

    @property
    def streams(self) -> int:
        """Return how many more tensors of the stream's size, in float32, are in memory at the same time."""
        changes = self.spans + 2 if CHANGE in self.signals else 0
        return changes + (9 if SIMILARITY in self.signals else 3 if NORMS in self.signals else 0)

    def column(self, layer: int, part: str, name: str) -> int:
        """Return the index of a quantity's sum among the numbers that are stored for a sequence."""
        return self._columns[layer, part, name]

    def is_measured(self, layer: int, part: str, name: str) -> bool:
        """Return whether a quantity is measured."""
        return (layer, part, name) in self._columns


class _BatchObservation:
    """Counts and sums of the batch that is being observed.

    Attributes:
        is_token: True for real tokens of sequences that have a prediction, (sequences, length).
        has_five_previous: True for tokens with at least five previous tokens, (sequences, length).
        pairs: True if the token has a token k positions before it, k = 1 to 5, (sequences, length, 5).
        is_last: True for the last token of each sequence, (sequences, length).
        sums: counts and sums by column, each (sequences,), float64.
        unedited: contributions of blocks of the unedited model, by block and part, as long as they are needed.
        second_of_swap: by the number of the stream after the first block of a swap: the block that the swap runs
            second.
    """

    def __init__(self, observer: Observer, mask: torch.Tensor) -> None:
        self.observer = observer
        self.sequences, self.length = mask.shape
        # A sequence of a single token has no prediction, so it is not part of any mean.
        self.is_token = mask.bool() & has_next_token(mask).any(-1, keepdim=True)
        # Positions count tokens, so that padding on the left does not count as previous text.
        positions = (mask.cumsum(-1) - 1).masked_fill(~self.is_token, -1)
        offsets = torch.arange(1, REACH + 1)
        self.has_five_previous = positions >= REACH
        self.pairs = positions[..., None] >= offsets
        self.is_last = (positions == positions.amax(-1, keepdim=True)) & self.is_token
        counted = (self.is_token, self.has_five_previous, self.pairs, self.is_last)
        self.sums = {column: flags.flatten(1).sum(-1).double() for column, flags in enumerate(counted)}
        self.unedited: dict[int, dict[str, torch.Tensor]] = {}
        self.second_of_swap: dict[int, int] = {}
        self._captured: dict[str, torch.Tensor] = {}
        self._attention: dict[int, tuple[torch.Tensor, int]] = {}  # weights summed over heads, and the number of heads
        self._is_capturing = self._is_capturing_attention = False
        self._changes = SpanDistances(observer.spans)
        self._masks: dict[tuple[str, torch.device], torch.Tensor] = {}

    def _mask(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a mask on a device. It is copied there once, since each copy makes the CPU wait for the GPU."""
        if (name, device) not in self._masks:
            self._masks[name, device] = getattr(self, name).to(device)
        return self._masks[name, device]

    def shape(self) -> torch.Size | None:
        """Return the batch's shape while contributions are to be captured, else None."""
        return self.is_token.shape if self._is_capturing else None

    @contextmanager
    def capturing(self, *, attention: bool = False) -> Iterator[None]:
        """Capture contributions, and attention weights if wanted, while the `with` block runs."""
        self._is_capturing, self._is_capturing_attention = True, attention
        try:
            yield
        finally:
            self._is_capturing = self._is_capturing_attention = False

    def capture(self, branch: str, scale: float, value: torch.Tensor) -> None:
        """Add a captured value, multiplied by `scale`, to the contribution of a branch."""
        value = value.float().mul(scale)  # makes a copy: the model may change the original in place
        captured = self._captured.get(branch)
        self._captured[branch] = value if captured is None else captured.add_(value.to(captured.device))

    def add_attention(self, block: int, recorded: PreviousTokenAttention) -> None:
        """Add the attention weights that one attention module of a block gave to the previous tokens."""
        if not self._is_capturing_attention:
            return
        if recorded.unreadable_kernels:
            kernels = ", ".join(sorted(recorded.unreadable_kernels))
            raise MeasurementError(
                f"block {block}: for this text, attention ran in a kernel ({kernels}) from which the weights cannot be "
                "read; use attn_implementation='eager'"
            )
        if recorded.weights_BTK is None:
            return
        heads = recorded.heads * len(recorded.weights_BTK) // self.sequences
        weights = recorded.weights_BTK.view(self.sequences, -1, self.length, REACH).sum(1).double()
        # If a block has several attention modules, take the mean over the heads of all of them.
        previous = self._attention.pop(block, None)
        if previous is not None:
            weights, heads = weights + previous[0].to(weights.device), heads + previous[1]
        self._attention[block] = weights, heads
        weights = weights / heads
        pairs = self._mask("pairs", weights.device)
        summed = torch.where(self._mask("has_five_previous", weights.device)[..., None], weights, 0)
        self._add(block, "attention", "attention_prev5", summed.flatten(1))
        self._add(block, "attention", "attention_prev5_mean", torch.where(pairs, weights, 0).flatten(1))

    def add_unedited(self, block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a block of the unedited model, which ran between the streams `before` and `after`."""
        observer, contributions = self.observer, self._take_contributions(before, after)
        self._attention.clear()
        if CHANGE in observer.signals and observer.observed_route[: block + 1] == Route.identity(block + 1):
            self.add_change(block, before, after)
        if NORMS in observer.signals:
            for branch in BRANCHES:
                if branch in contributions:
                    self._add_tokens(block, branch, f"{branch}_norm", contributions[branch].norm(dim=-1))
        if SIMILARITY in observer.signals:
            self.unedited[block] = contributions
            self._add_similarity(block - 1, "adjacent", contributions)

    def add_change(self, block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the change of the stream by a block of the observed route, and by every span of blocks that it ends."""
        self._add_tokens(block, "1", "block_influence", block_influence(before.to(after.device), after))
        for first, span, stream in self._changes.add_block(block, before, after):
            distance = angular_distance(stream, after)
            self._add_tokens(first, str(span), "angular_distance", distance)
            at_last_token = torch.where(self._mask("is_last", distance.device), distance.double(), 0)
            self._add(first, str(span), "angular_distance_last", at_last_token)

    def add_swapped(self, step: RunBlock, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a block that ran as the first or second one of a swap."""
        block = step.visit.block
        contributions = self._take_contributions(before, after)
        if self.second_of_swap.get(step.state) == block:
            self._add_similarity(block, "self", contributions)
            self.unedited.pop(block)
        else:  # the first block of a swap, which has moved one position forward
            self.second_of_swap[step.result] = block - 1
            self._add_similarity(block - 1, "index", contributions)

    def _take_contributions(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the contributions of the block that has just run, by part, float32, and forget them.

        The whole block's contribution is the sum over its branches, or the change of the stream if no branch was
        captured.
        """
        contributions, self._captured = self._captured, {}
        if SIMILARITY in self.observer.signals:
            branches = list(contributions.values())
            contributions["block"] = (
                sum((branch.to(branches[0].device) for branch in branches[1:]), branches[0])
                if branches
                else after.float() - before.to(after.device).float()
            )
        if self.observer.reads_are_mean_free:
            contributions = {part: value - value.mean(-1, keepdim=True) for part, value in contributions.items()}
        return contributions

    def _add_similarity(self, layer: int, kind: str, contributions: dict[str, torch.Tensor]) -> None:
        """Add the cosine between contributions and those of block `layer` in the unedited model."""
        for part, unedited in self.unedited.get(layer, {}).items():
            if self.observer.is_measured(layer, part, kind):
                cosine = functional.cosine_similarity(
                    unedited, contributions[part].to(unedited.device), dim=-1, eps=1e-30
                )
                self._add_tokens(layer, part, kind, cosine)

    def _add_tokens(self, layer: int, part: str, name: str, values: torch.Tensor) -> None:
        """Add values of all real tokens, (sequences, length)."""
        self._add(layer, part, name, torch.where(self._mask("is_token", values.device), values.double(), 0))

    def _add(self, layer: int, part: str, name: str, values: torch.Tensor) -> None:
        """Store the sums of values over each sequence, (sequences, any number)."""
        # Sum each sequence separately, so that its digits do not depend on the other sequences in the batch.
        self.sums[self.observer.column(layer, part, name)] = torch.stack([row.sum() for row in values])


def count_columns(quantities: Sequence[Quantity]) -> list[int]:
    """Return for each quantity the index in `COUNTS` of the count that its sum is divided by."""
    return [COUNTS.index(quantity.count) for quantity in quantities]


def first_quantity() -> int:
    """Return the index of the first quantity's sum, which follows the counts."""
    return len(COUNTS)
