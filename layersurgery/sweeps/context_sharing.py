"""Decide for a model whether contexts that requests share are run once, by trying it on the unedited model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from ..errors import is_out_of_memory
from ..metrics import dispatch
from ..models.block_list import text_config
from ..runtime.block_runner import BlockRunner
from ..runtime.inputs import model_inputs, packed_inputs, takes_positions
from ..runtime.unembedding import Readout
from .read_positions import ReadTokens
from .shared_contexts import PackedRequests, Tree, fill_sequences, find_trees, pack_requests

SHARED = "shared"
"""What `ContextSharing.outcome` says if every shared context was run once."""
_LONGEST = 4  # times the longest request: attention computes the whole square of a packed sequence
_MATRIX_WIDTHS = 6  # a block's products with weights cost as much as attention to 6 streams' widths of tokens
_CHECKED_REQUESTS = 2
_WINDOWS = (
    "sliding_window",
    "sliding_windows",
    "sliding_window_size",
    "attention_chunk_size",
    "window_size",
    "attention_window_size",
)
_EXACT = 1e-4  # nats, the root of the mean square over tokens that rounding in float32 explains in any model
_NOISE = 4  # times the difference that padding the requests to the packed length makes
_SHARE = 0.2  # of the difference that packing them without the mask makes


class ContextSharing:
    """Pack requests where it saves work and the model allows it.

    Not every model can run several continuations of one context in one sequence: blocks with a recurrent state do not
    read a mask, positions may be counted by the attention itself, and a given mask replaces that of a window. So the
    log-probabilities of a few packed requests are compared with those of the same requests run separately, before
    the first batch and before one with longer sequences.

    Args:
        runner: runs the model's blocks.
        readout: maps streams to logits.
        by_position: whether an edit depends on the positions of tokens; then no context is shared.

    Attributes:
        tokens: number of tokens that were run.
        tokens_apart: number of tokens without sharing, padding included.
    """

    def __init__(self, runner: BlockRunner, readout: Readout, *, by_position: bool = False) -> None:
        self.runner, self.readout = runner, readout
        self.tokens = self.tokens_apart = 0
        self._checked = 0
        self._reason: str | None = None
        self._refused = False
        self._config = text_config(runner.model)
        if by_position:
            self._refuse("an edit leaves the first tokens of each request, and some blocks count tokens themselves")
        self._positions: float = getattr(self._config, "max_position_embeddings", None) or math.inf

    @property
    def outcome(self) -> str | None:
        """Return "shared", or why contexts were run for each of their continuations; None if none is shared."""
        return SHARED if self._checked and not self._refused else self._reason

    def describe(self) -> str | None:
        """Say in a sentence what was done; None if no context is shared."""
        if self.outcome is None:
            return None
        if self.outcome != SHARED:
            return f"Note: contexts that several requests share were run for each of them: {self.outcome}"
        percent = 100 * self.tokens / self.tokens_apart
        return f"Contexts that several requests share were run once: {percent:.0f} % of the tokens of all requests"

    def pack(self, ids: torch.Tensor, mask: torch.Tensor, reads: torch.Tensor) -> PackedRequests | None:
        """Pack the requests of a batch; return None to run them as they are.

        Args:
            ids: tokens, (requests, length), padded on the right.
            mask: 1 for a token and 0 for padding, the same shape.
            reads: True at the positions that are read, (requests, length - 1).
        """
        lengths, apart = mask.sum(-1) - 1, ids.shape[1] - 1
        self.tokens_apart += len(ids) * apart
        packed = self._pack(ids, lengths, reads, apart)
        self.tokens += len(ids) * apart if packed is None else packed.ids.numel()
        return packed

    def _pack(self, ids: torch.Tensor, lengths: torch.Tensor, reads: torch.Tensor, apart: int) -> PackedRequests | None:
        if self._refused:
            return None
        longest = min(_LONGEST * apart, self._positions)
        trees = find_trees(ids, lengths, reads, longest)
        if len(trees) == len(ids):
            return None
        if self.runner.compiler is not None:
            self._refuse("each shape of a batch would be compiled by itself")
            return None
        window = self._window()
        if apart > window:
            self._reason = f"the requests are longer than the window of the model's attention, {window} tokens"
            return None
        if longest > window:
            trees = find_trees(ids, lengths, reads, window)
        packed = pack_requests(ids, lengths, reads, fill_sequences(trees))
        if not self._saves(*packed.ids.shape, *ids[:, 1:].shape):
            return None
        if packed.ids.shape[1] > self._checked:
            tree = max((tree for tree in trees if len(tree.requests) > 1), key=lambda tree: tree.length)
            if (reason := self._find_reason(ids, lengths, reads, tree)) is not None:
                self._refuse(reason)
                return None
            self._checked = packed.ids.shape[1]
        return packed

    def _refuse(self, reason: str) -> None:
        """Pack no more requests."""
        self._reason, self._refused = reason, True

    def _window(self) -> float:
        """Return the number of tokens that the shortest window of the model's attention sees; infinity if it sees all.

        A given mask replaces that of the window, and some models count the tokens of a window in the sequence.
        """
        if getattr(self._config, "use_sliding_window", None) is False:
            return math.inf
        settings = [getattr(self._config, name, None) for name in _WINDOWS]
        windows = [window for value in settings for window in (value if isinstance(value, list | tuple) else [value])]
        return min((window for window in windows if isinstance(window, int) and window > 0), default=math.inf)

    def _saves(self, sequences: int, length: int, requests: int, apart: int) -> bool:
        """Return whether packed sequences take less work, and no more memory, than the requests."""
        if getattr(self._config, "_attn_implementation", "") == "eager" and sequences * length**2 > requests * apart**2:
            return False  # eager attention stores its matrix
        matrices = _MATRIX_WIDTHS * self.runner.width
        cost, cost_apart = (
            count * size * (matrices + size) for count, size in ((sequences, length), (requests, apart))
        )
        return sequences * length < requests * apart and cost < cost_apart

    def _find_reason(self, ids: torch.Tensor, lengths: torch.Tensor, reads: torch.Tensor, tree: Tree) -> str | None:
        """Try a few requests of a tree on the unedited model; return why they cannot be packed, or None."""
        model = self.runner.model
        name = type(model).__name__
        if not takes_positions(model):
            return f"{name} takes no position ids"
        requests = tree.requests[:_CHECKED_REQUESTS]
        rows = list(requests)
        branches = sum(int(lengths[row]) - tree.context for row in requests)
        trees = [Tree(tree.context, tuple(range(len(rows))), tree.context + branches)]
        if trees[0].length + int(lengths[requests[0]]) <= self._positions:
            # The first one again, as a tree of its own in the same sequence, which must not see the other tree.
            trees.append(Tree(tree.context, (len(rows),), int(lengths[requests[0]])))
            rows.append(requests[0])
        ids, lengths, reads = ids[rows], lengths[rows], reads[rows]
        packed = pack_requests(ids, lengths, reads, [trees])
        apart = self._losses_apart(ids, lengths, reads, int(lengths.max()))
        try:
            found = self._losses(packed_inputs(model, packed.ids, packed.positions, packed.visible), packed.reads)
        except Exception as failure:  # models that cannot read such a mask raise any exception
            if is_out_of_memory(failure):
                raise
            return f"{name} cannot run them: {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        blind = self._losses(model_inputs(model, packed.ids, torch.ones_like(packed.ids)), packed.reads)
        error, without_mask = (_root_mean_square(losses - apart) for losses in (found, blind))
        most = _EXACT
        if error > most:  # in half precision, rounding explains more
            padded = self._losses_apart(ids, lengths, reads, packed.ids.shape[1])
            most = max(most, _NOISE * _root_mean_square(padded - apart))
        if error <= most and error <= _SHARE * without_mask:
            return None
        return f"then the predictions of {name} differ by {error:.2g} nats"

    def _losses_apart(self, ids: torch.Tensor, lengths: torch.Tensor, reads: torch.Tensor, length: int) -> torch.Tensor:
        """Return the losses of requests that are run as they are, padded to a length."""
        ids, reads = (functional.pad(part, (0, length + 1 - ids.shape[1])) for part in (ids, reads))
        mask = (torch.arange(length) < lengths[:, None]).long()
        return self._losses(model_inputs(self.runner.model, ids[:, :-1], mask), ReadTokens.of(ids, reads, length))

    def _losses(self, inputs: dict[str, Any], reads: ReadTokens) -> torch.Tensor:
        """Return the negative log-probability of each token that is read."""
        stream = self.runner.record(inputs, ()).states[self.runner.depth]
        x = self.readout.normalize(stream, reads.positions.to(stream.device))
        return dispatch.baseline(self.readout, x, reads.targets).stats.loss


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
