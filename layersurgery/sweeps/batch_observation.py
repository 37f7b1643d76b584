"""Sum the signals of one batch by sequence while its blocks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from ..errors import MeasurementError
from ..plans.route import Route
from ..runtime.attention_weights import REACH, PreviousTokenAttention
from ..runtime.contributions import BRANCHES
from ..runtime.inputs import has_next_token
from ..runtime.residual_change import SpanDistances, angular_distance, block_influence
from .quantities import CHANGE, NORMS, SIMILARITY, Observed, Quantities
from .schedule import RunBlock


class BatchObservation:
    """Counts and sums of the batch that is being observed.

    Args:
        observed: the choice of what is observed.
        quantities: the measured means.
        mask: 1 for a token and 0 for padding, (sequences, length).
        mean_free: remove the mean over channels from contributions.

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

    def __init__(self, observed: Observed, quantities: Quantities, mask: torch.Tensor, *, mean_free: bool) -> None:
        self.observed, self.quantities, self.mean_free = observed, quantities, mean_free
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
        self._changes = SpanDistances(observed.spans)
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
        signals, contributions = self.observed.signals, self._take_contributions(before, after)
        self._attention.clear()
        route = self.observed.route
        if CHANGE in signals and (route is None or route[: block + 1] == Route.identity(block + 1)):
            self.add_change(block, before, after)
        if NORMS in signals:
            for branch in BRANCHES:
                if branch in contributions:
                    self._add_tokens(block, branch, f"{branch}_norm", contributions[branch].norm(dim=-1))
        if SIMILARITY in signals:
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
        if SIMILARITY in self.observed.signals:
            branches = list(contributions.values())
            contributions["block"] = (
                sum((branch.to(branches[0].device) for branch in branches[1:]), branches[0])
                if branches
                else after.float() - before.to(after.device).float()
            )
        if self.mean_free:
            contributions = {part: value - value.mean(-1, keepdim=True) for part, value in contributions.items()}
        return contributions

    def _add_similarity(self, layer: int, kind: str, contributions: dict[str, torch.Tensor]) -> None:
        """Add the cosine between contributions and those of block `layer` in the unedited model."""
        for part, unedited in self.unedited.get(layer, {}).items():
            if self.quantities.is_measured(layer, part, kind):
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
        self.sums[self.quantities.column(layer, part, name)] = torch.stack([row.sum() for row in values])
