"""Sum the signals of one batch by sequence while its blocks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from ..errors import MeasurementError
from ..metrics.stream_similarity import MIN_TOKENS, cosine_sums, unbiased_hsic
from ..plans.route import Route
from ..runtime.attention_weights import REACH, PreviousTokenAttention
from ..runtime.contributions import BRANCHES
from ..runtime.inputs import has_next_token
from ..runtime.residual_change import SpanDistances, angular_distance, block_influence
from .quantities import BRANCH_CHANGE, CHANGE, CKA, COSINE, NORMS, OF_PAIRS, SIMILARITY, STREAM, Observed, Quantities
from .schedule import RunBlock


class BatchObservation:
    """Counts and sums of the batch that is being observed.

    Args:
        observed: the choice of what is observed.
        quantities: the measured means.
        mask: 1 for a token and 0 for padding, (sequences, length).
        mean_free: remove the mean over channels from contributions and from the stream.

    Attributes:
        is_token: True for real tokens of sequences that have a prediction, (sequences, length).
        has_five_previous: True for tokens with at least five previous tokens, (sequences, length).
        pairs: True if the token has a token k positions before it, k = 1 to 5, (sequences, length, 5).
        is_last: True for the last token of each sequence, (sequences, length).
        is_first: True for the first token of each sequence, (sequences, length).
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
        self.is_first = positions == 0
        tokens = self.is_token.sum(-1, keepdim=True)
        counted = (
            self.is_token, self.has_five_previous, self.pairs, self.is_last, self.is_first,
            tokens >= MIN_TOKENS, tokens > MIN_TOKENS,
        )  # fmt: skip
        self.sums = {column: flags.flatten(1).sum(-1).double() for column, flags in enumerate(counted)}
        self.unedited: dict[int, dict[str, torch.Tensor]] = {}
        self.second_of_swap: dict[int, int] = {}
        self._states: list[torch.Tensor] = []
        self._captured: dict[str, torch.Tensor] = {}
        self._attention: dict[int, tuple[torch.Tensor, int]] = {}  # weights summed over heads, and the number of heads
        self._changes = SpanDistances(observed.spans)
        self._masks: dict[tuple[str, torch.device], torch.Tensor] = {}

    def _mask(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a mask on a device. It is copied there once, since each copy makes the CPU wait for the GPU."""
        if (name, device) not in self._masks:
            self._masks[name, device] = getattr(self, name).to(device)
        return self._masks[name, device]

    def capture(self, branch: str, scale: float, value: torch.Tensor) -> None:
        """Add a captured value, multiplied by `scale`, to the contribution of a branch."""
        value = value.float().mul(scale)  # makes a copy: the model may change the original in place
        captured = self._captured.get(branch)
        self._captured[branch] = value if captured is None else captured.add_(value.to(captured.device))

    def add_attention(self, block: int, recorded: PreviousTokenAttention) -> None:
        """Add the attention weights that one attention module of a block gave to the previous tokens."""
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

    def add_unedited(self, block: int, before: torch.Tensor, after: torch.Tensor, *, parallel: bool) -> None:
        """Add a block of the unedited model.

        Args:
            block: its number.
            before: the stream before it.
            after: the stream after it.
            parallel: whether its branches read the same stream.
        """
        signals, contributions = self.observed.signals, self._take_contributions(before, after)
        self._attention.clear()
        route = self.observed.route
        if CHANGE in signals and (route is None or route[: block + 1] == Route.identity(block + 1)):
            self.add_change(block, before, after)
        if NORMS in signals:
            for branch in BRANCHES:
                if branch in contributions:
                    self._add_tokens(block, branch, f"{branch}_norm", contributions[branch].norm(dim=-1))
        if STREAM in signals:
            stream = self._readable(before)
            self._add_stream(block, stream)
            self._add_ratios(block, stream, contributions, parallel)
        if BRANCH_CHANGE in signals:
            self._add_branch_changes(block, before.float(), contributions, parallel)
        if not {*OF_PAIRS}.isdisjoint(signals):
            self._states.append(before)
        if SIMILARITY in signals:
            self.unedited[block] = contributions
            self._add_similarity(block - 1, "adjacent", contributions)

    def add_final_stream(self, state: int, stream: torch.Tensor) -> None:
        """Add the stream after the last block of the unedited model, which is the last state."""
        signals = self.observed.signals
        if STREAM in signals:
            self._add_stream(state, self._readable(stream))
        states, self._states = [*self._states, stream], []
        if CKA in signals:
            self._add_pairs(("hsic", "hsic_without_first"), states, unbiased_hsic)
        if COSINE in signals:
            self._add_pairs(("cosine",), states, cosine_sums)

    def _add_stream(self, state: int, stream: torch.Tensor) -> None:
        """Add the size of a state of the stream, float32."""
        norm = stream.norm(dim=-1)
        self._add_tokens(state, "stream", "stream_norm", norm)
        of_first = torch.where(self._mask("is_first", norm.device), norm.double(), 0)
        self._add(state, "stream", "first_token_norm", of_first)
        self._add_tokens(state, "stream", "stream_variance", stream.var(-1, correction=0))

    def _add_ratios(
        self, block: int, stream: torch.Tensor, contributions: dict[str, torch.Tensor], parallel: bool
    ) -> None:
        """Add how large each branch's contribution is compared with the stream that it is added to, and its cosine.

        Branches that run one after the other are captured in their order, and the second is added to the stream and the
        first.
        """
        for branch in (name for name in contributions if name in BRANCHES):
            contribution = contributions[branch]
            stream = stream.to(contribution.device)
            length = stream.norm(dim=-1).clamp(min=torch.finfo(stream.dtype).tiny)
            self._add_tokens(block, branch, f"{branch}_to_stream", contribution.norm(dim=-1) / length)
            cosine = functional.cosine_similarity(contribution, stream, dim=-1, eps=1e-30)
            self._add_tokens(block, branch, f"{branch}_cosine", cosine)
            stream = stream if parallel else stream + contribution

    def _add_branch_changes(
        self, block: int, stream: torch.Tensor, contributions: dict[str, torch.Tensor], parallel: bool
    ) -> None:
        """Add how far each branch turns the stream that it is added to: that before the block if both read it."""
        for branch in (name for name in contributions if name in BRANCHES):
            stream = stream.to(contributions[branch].device)
            after = stream + contributions[branch]
            self._add_tokens(block, branch, "block_influence", block_influence(stream, after))
            self._add_distance(block, branch, angular_distance(stream, after))
            stream = stream if parallel else after

    def _add_pairs(
        self, names: Sequence[str], states: Sequence[torch.Tensor], sum_pairs: Callable[..., torch.Tensor]
    ) -> None:
        """Add sums over the tokens of each sequence, for all pairs of states.

        Args:
            names: the names of the quantities.
            states: the states, each (sequences, length, width).
            sum_pairs: returns the sums of one sequence, (len(names), states, states), from the states of its tokens.
        """
        shape = self.sequences, len(names), len(states), len(states)
        sums = torch.zeros(shape, dtype=torch.float64, device=states[-1].device)
        for number, is_token in enumerate(self.is_token):
            positions = is_token.nonzero()[:, 0]
            if len(positions):
                first, last = int(positions[0]), int(positions[-1])
                # A slice copies nothing. Only a mask with holes needs a copy.
                chosen = slice(first, last + 1) if last - first < len(positions) else positions
                own = [state[number][chosen] for state in states]
                sums[number] = sum_pairs(own, mean_free=self.mean_free)
        for index, name in enumerate(names):
            for one in range(len(states)):
                for two in range(one, len(states)):
                    self.sums[self.quantities.column(one, str(two), name)] = sums[:, index, one, two]

    def _readable(self, stream: torch.Tensor) -> torch.Tensor:
        """Return in float32 what is read of a stream or a contribution, (sequences, length, width)."""
        stream = stream.float()
        return stream - stream.mean(-1, keepdim=True) if self.mean_free else stream

    def add_change(self, block: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the change of the stream by a block of the observed route, and by every span of blocks that it ends."""
        self._add_tokens(block, "1", "block_influence", block_influence(before.to(after.device), after))
        for first, span, stream in self._changes.add_block(block, before, after):
            self._add_distance(first, str(span), angular_distance(stream, after))

    def _add_distance(self, layer: int, part: str, distance: torch.Tensor) -> None:
        """Add the angular distance of a change, (sequences, length)."""
        self._add_tokens(layer, part, "angular_distance", distance)
        at_last_token = torch.where(self._mask("is_last", distance.device), distance.double(), 0)
        self._add(layer, part, "angular_distance_last", at_last_token)

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
        return {part: self._readable(value) for part, value in contributions.items()}

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
