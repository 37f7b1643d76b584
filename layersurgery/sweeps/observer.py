"""What is read off a model's blocks while they run: attention to the tokens right before, sizes of contributions, their similarity.

Everything is summed up by sequence as it passes; no activation outlives the batch, and none but those of two neighbouring blocks is kept
where blocks are swapped. The swaps are the first steps of the sweep's own routes: block l + 1 upon the stream before l, then l.
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
KINDS = ("self", "index", "adjacent")
COUNTS = ("tokens", "has_five_previous", "pairs", "last_tokens")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A mean that is measured: one column of sums, and the column that counts what was summed.

    Attributes:
        signal: which analysis it belongs to.
        layer: the block; of a swap, the first of the two.
        part: "attention", "mlp" or "block"; of a change, the number of blocks that make it.
        name: the column of the table.
        count: what is counted: real tokens ("tokens"), those with five before them ("has_five_previous"), pairs of a token and one of the five before
            it ("pairs"), or last tokens of sequences ("last_tokens").
    """

    signal: str
    layer: int
    part: str
    name: str
    count: str


class Observer:
    """Watches a model's blocks.

    Args:
        runner: the blocks.
        signals: what to observe, of `SIGNALS`, or "change".
        spans: of changes, up to how many blocks together.
        along: of changes, the route that is observed, which visits no block twice; the unedited model if not given.

    Attributes:
        members: the blocks, as far as their parts can be told apart.
        centred: whether contributions are taken without their mean over channels, because all that reads them takes it away (LayerNorm).
        quantities: what is measured, in the order of the sums; what a block does not have is not among them.
        skipped: what cannot be observed, and why.
    """

    def __init__(
        self, runner: BlockRunner, signals: Collection[str], *, spans: int = 1, observed_route: Route | None = None
    ) -> None:
        self.runner, self.signals = runner, frozenset(signals)
        self.spans, self.observed_route = (
            spans,
            Route.identity(runner.depth) if observed_route is None else observed_route,
        )
        assert observed_route is None or (self.signals == {CHANGE} and spans == 1)
        whole = self.signals <= {CHANGE}  # of blocks as wholes, parts need not be known
        self.contributions = (
            [BlockContributions((), (), "", False)] * runner.depth
            if whole
            else find_contributions(runner, check_attention=ATTENTION in self.signals)
        )
        self.reads_are_mean_free = not whole and reads_are_mean_free(runner)
        self.skipped: dict[str, str] = {}
        self.quantities = tuple(self._quantities())
        self._place = {(q.layer, q.part, q.name): number for number, q in enumerate(self.quantities, len(COUNTS))}
        self._context: _Context | None = None

    @property
    def size(self) -> int:
        """Numbers kept of each sequence: counts, and a sum for each quantity."""
        return len(COUNTS) + len(self.quantities)

    @property
    def routes(self) -> list[Route]:
        """What is to be run beside the unedited model: each swap of neighbours, as far as the second of the two; or the route observed."""
        if self.observed_route != Route.identity(self.runner.depth):
            return [self.observed_route]
        if SIMILARITY not in self.signals:
            return []
        return [
            Route((*map(Visit, range(layer)), Visit(layer + 1), Visit(layer))) for layer in range(self.runner.depth - 1)
        ]

    def _quantities(self) -> Iterator[Quantity]:
        for layer, member in enumerate(self.contributions):
            if ATTENTION in self.signals:
                if member.attends:
                    yield Quantity(ATTENTION, layer, "attention", "attention_prev5", "has_five_previous")
                    yield Quantity(ATTENTION, layer, "attention", "attention_prev5_mean", "pairs")
                else:
                    why = member.attention_error or f"{member.names or 'the block'} attends to no tokens by softmax"
                    self.skipped[f"attention of block {layer}"] = why
            if NORMS in self.signals:
                for part in BRANCHES:
                    if member.has(part):
                        yield Quantity(NORMS, layer, part, f"{part}_norm", "tokens")
                    else:
                        self.skipped[f"{part} norm of block {layer}"] = member.error or f"the block has no {part}"
        if SIMILARITY in self.signals:
            if self.runner.depth < 2:
                self.skipped["similarity"] = "the model has one block, and none to swap it with"
            for layer in range(self.runner.depth - 1):
                for name in PARTS:
                    why = self._not_comparable(layer, name)
                    if why:
                        self.skipped[f"{name} similarity of blocks {layer} and {layer + 1}"] = why
                    else:
                        yield from (Quantity(SIMILARITY, layer, name, kind, "tokens") for kind in KINDS)

        if CHANGE in self.signals:
            visited = self.observed_route.blocks
            for place, layer in enumerate(visited):
                yield Quantity(CHANGE, layer, "1", "block_influence", "tokens")
                for span in range(1, min(self.spans, len(visited) - place) + 1):
                    yield Quantity(CHANGE, layer, str(span), "angular_distance", "tokens")
                    yield Quantity(CHANGE, layer, str(span), "angular_distance_last", "last_tokens")

    def _not_comparable(self, layer: int, part: str) -> str:
        """Why a part of two neighbours cannot be compared."""
        for number in (layer, layer + 1):
            member = self.contributions[number]
            if part in BRANCHES and not member.has(part):
                return member.error or f"one of the blocks has no {part}"
        return ""

    @contextmanager
    def observing(self, mask: torch.Tensor) -> Iterator[None]:
        """Inside, a batch with this mask, (sequences, length), is observed."""
        self._context = _Context(self, mask)
        try:
            with ExitStack() as runner:
                for number, block in enumerate(self.runner.blocks):
                    member = self.contributions[number]
                    looks = (
                        partial(self._context.look, number) if ATTENTION in self.signals and member.attends else None
                    )
                    taps = [
                        (tap, partial(self._context.caught, tap.branch, tap.scale)) for tap in member.capture_points
                    ]
                    wanted = taps if self.signals & {NORMS, SIMILARITY} else []
                    runner.enter_context(
                        capture_contributions(block, wanted, member.mixers, looks, self._context.shape)
                    )
                yield
        finally:
            self._context = None

    @contextmanager
    def trunk(self, block: int, record: ForwardRecord) -> Iterator[None]:
        """While a block of the unedited model runs."""
        context = self._now()
        with context.catching(looks=True):
            yield
        assert record.last_block is not None
        context.trunk(block, *record.last_block)

    def run(self, step: RunBlock, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a block of an edited model; `call` does it."""
        context = self._now()
        if CHANGE in self.signals and not self.observed_route.is_identity(self.runner.depth):
            after = call()
            context.changed(step.visit.block, stream, after)
            return after
        first, second = step.state == step.visit.block - 1, context.moved.get(step.state) == step.visit.block
        if SIMILARITY not in self.signals or not step.visit.whole or not (first or second):
            return call()
        with context.catching():
            after = call()
        context.swapped(step, stream, after)
        return after

    def sums(self) -> Array:
        """Of the batch that is being watched: (sequences, size), float64.

        Raises:
            MeasurementError: something was to be seen, and was not.
        """
        found = self._now().sums
        for number, quantity in enumerate(self.quantities, len(COUNTS)):
            if number not in found:
                raise MeasurementError(
                    f"block {quantity.layer}: its {quantity.part} ran otherwise than on seven tokens, so {quantity.name} was not seen; with "
                    "attn_implementation='eager' it may be"
                )
        return torch.stack([found[number].cpu() for number in range(self.size)], 1).numpy()

    def _now(self) -> _Context:
        assert self._context is not None, "no batch is being watched"
        return self._context

    @property
    def names(self) -> list[str]:
        """What each number of a sequence is, in words."""
        return [
            *COUNTS,
            *(f"{quantity.part} {quantity.name} of block {quantity.layer}" for quantity in self.quantities),
        ]

    @property
    def streams(self) -> int:
        """How many tensors as large as the stream, in float32, are alive at once beside it."""
        changes = self.spans + 2 if CHANGE in self.signals else 0
        return changes + (9 if SIMILARITY in self.signals else 3 if NORMS in self.signals else 0)

    def column(self, layer: int, part: str, name: str) -> int:
        """Where among the numbers of a sequence a quantity's sum is."""
        return self._place[layer, part, name]

    def is_measured(self, layer: int, part: str, name: str) -> bool:
        """Whether a quantity is measured."""
        return (layer, part, name) in self._place


class _Context:
    """One batch."""

    def __init__(self, observer: Observer, mask: torch.Tensor) -> None:
        self.observer = observer
        self.sequences, self.length = mask.shape
        # A sequence of a single token has no prediction, and is in none of the means.
        self.real = mask.bool() & has_next_token(mask).any(-1, keepdim=True)
        # Padding in front does not count as text before a token.
        place = (mask.cumsum(-1) - 1).masked_fill(~self.real, -1)
        back = torch.arange(1, REACH + 1)
        self.late = place >= REACH
        self.pairs = place[..., None] >= back
        last = place == place.amax(-1, keepdim=True)
        self.ends = last & self.real
        counted = (self.real, self.late, self.pairs, self.ends)
        self.sums = {number: some.flatten(1).sum(-1).double() for number, some in enumerate(counted)}
        self.own: dict[int, dict[str, torch.Tensor]] = {}
        self.moved: dict[int, int] = {}
        self._caught: dict[str, torch.Tensor] = {}
        self._heads: dict[int, tuple[torch.Tensor, int]] = {}
        self._open = self._looking = False
        self.changes = SpanDistances(observer.spans)

    def shape(self) -> torch.Size | None:
        return self.real.shape if self._open else None

    @contextmanager
    def catching(self, *, looks: bool = False) -> Iterator[None]:
        self._open, self._looking = True, looks
        try:
            yield
        finally:
            self._open = self._looking = False

    def caught(self, part: str, times: float, value: torch.Tensor) -> None:
        value = value.float().mul(times)  # a copy of its own: others may add to it in place
        held = self._caught.get(part)
        self._caught[part] = value if held is None else held.add_(value.to(held.device))

    def look(self, block: int, seen: PreviousTokenAttention) -> None:
        if not self._looking:
            return
        if seen.unknown:
            raise MeasurementError(
                f"block {block}: this text's attention ran by a kernel ({', '.join(sorted(seen.unknown))}) that does not tell; "
                "attn_implementation='eager' does"
            )
        if seen.weights_BTK is None:
            return
        heads = seen.heads * len(seen.weights_BTK) // self.sequences
        weights = seen.weights_BTK.view(self.sequences, -1, self.length, REACH).sum(1).double()
        # Of several modules that attend, the mean over all heads.
        before = self._heads.pop(block, None)
        if before is not None:
            weights, heads = weights + before[0].to(weights.device), heads + before[1]
        self._heads[block] = weights, heads
        weights = weights / heads
        late, pairs = self.late.to(weights.device), self.pairs.to(weights.device)
        self._add(block, "attention", "attention_prev5", torch.where(late[..., None], weights, 0).flatten(1))
        self._add(block, "attention", "attention_prev5_mean", torch.where(pairs, weights, 0).flatten(1))

    def trunk(self, block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        observer, parts = self.observer, self._parts(before, after)
        self._heads.clear()
        if CHANGE in observer.signals and observer.observed_route[: block + 1] == Route.identity(block + 1):
            self.changed(block, before, after)
        if NORMS in observer.signals:
            for part in BRANCHES:
                if part in parts:
                    self._add_tokens(block, part, f"{part}_norm", parts[part].norm(dim=-1))
        if SIMILARITY in observer.signals:
            self.own[block] = parts
            self._compare(block - 1, "adjacent", parts)

    def changed(self, block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """A block of the route that is observed has run."""
        self._add_tokens(block, "1", "block_influence", block_influence(before.to(after.device), after))
        for first, span, stream in self.changes.add_block(block, before, after):
            distance = angular_distance(stream, after)
            self._add_tokens(first, str(span), "angular_distance", distance)
            at_end = torch.where(self.ends.to(distance.device), distance.double(), 0)
            self._add(first, str(span), "angular_distance_last", at_end)

    def swapped(self, step: RunBlock, before: torch.Tensor, after: torch.Tensor) -> None:
        block = step.visit.block
        parts = self._parts(before, after)
        if self.moved.get(step.state) == block:
            self._compare(block, "self", parts)
            self.own.pop(block)
        else:  # the block that has come forward
            self.moved[step.result] = block - 1
            self._compare(block - 1, "index", parts)

    def _parts(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a block has added to the stream, by part, float32; the whole as the sum of its parts where they are known."""
        parts, self._caught = self._caught, {}
        if SIMILARITY in self.observer.signals:
            known = list(parts.values())
            parts["block"] = (
                sum((part.to(known[0].device) for part in known[1:]), known[0])
                if known
                else after.float() - before.to(after.device).float()
            )
        if self.observer.reads_are_mean_free:
            parts = {name: value - value.mean(-1, keepdim=True) for name, value in parts.items()}
        return parts

    def _compare(self, layer: int, kind: str, parts: dict[str, torch.Tensor]) -> None:
        for part, own in self.own.get(layer, {}).items():
            if self.observer.is_measured(layer, part, kind):
                cosine = functional.cosine_similarity(own, parts[part].to(own.device), dim=-1, eps=1e-30)
                self._add_tokens(layer, part, kind, cosine)

    def _add_tokens(self, layer: int, part: str, name: str, values: torch.Tensor) -> None:
        self._add(layer, part, name, torch.where(self.real.to(values.device), values.double(), 0))

    def _add(self, layer: int, part: str, name: str, values: torch.Tensor) -> None:
        # One sequence at a time, so that its digits do not depend on the others in the batch.
        self.sums[self.observer.column(layer, part, name)] = torch.stack([row.sum() for row in values])


def counts_of(quantities: Sequence[Quantity]) -> list[int]:
    """For each quantity, which number of a sequence counts what was summed."""
    return [COUNTS.index(quantity.count) for quantity in quantities]


def first_quantity() -> int:
    """Where the sums of quantities begin, behind the counts."""
    return len(COUNTS)
