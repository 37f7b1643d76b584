"""Find the greatest logits in slices of the vocabulary, and which of the given tokens are among the greatest.

torch vectorizes a maximum, but neither its position nor a selection of several. So each row is divided into blocks,
whose maxima say in which few blocks to look.

Suffixes of names give shapes: T tokens, C one slice of the vocabulary, K the most likely tokens.
"""

from __future__ import annotations

import math

import torch

from .reference import TOP

BLOCK = 64


def in_blocks(z_TC: torch.Tensor) -> torch.Tensor:
    """Reshape to (T, blocks, columns); one block if the width is not a multiple of the block size."""
    width = z_TC.shape[1]
    block = width if width % BLOCK else BLOCK
    return z_TC.reshape(len(z_TC), width // block, block)


def first_argmax(z_TC: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Return the first index of the maximum of each row; `best` has the maximum of each block."""
    rows = in_blocks(z_TC)
    block = best.argmax(-1)
    inside = rows[torch.arange(len(rows), device=z_TC.device), block]
    return block * rows.shape[2] + inside.argmax(-1)


class TopTokens:
    """Find the most likely tokens; the lowest ones of equals.

    Attributes:
        tokens_TK: the tokens of the slices so far, the most likely first.
    """

    def __init__(self) -> None:
        self.tokens_TK = torch.empty(0)
        self._logits_TK = torch.empty(0)

    def add(self, z_TC: torch.Tensor, start: int) -> None:
        """Add a slice of the vocabulary that begins at `start`; slices come in their order. Changes the logits."""
        for _ in range(min(TOP, z_TC.shape[1])):
            column = first_argmax(z_TC, in_blocks(z_TC).amax(-1))[:, None]
            logits_TK, tokens_TK = z_TC.gather(-1, column), column + start
            if self.tokens_TK.numel():
                logits_TK = torch.cat([self._logits_TK, logits_TK], -1)
                tokens_TK = torch.cat([self.tokens_TK, tokens_TK], -1)
            logits_TK, order = logits_TK.sort(dim=-1, descending=True, stable=True)
            self._logits_TK, self.tokens_TK = logits_TK[:, :TOP], tokens_TK.gather(-1, order[:, :TOP])
            z_TC.scatter_(-1, column, -math.inf)


class Overlap:
    """Find which of the given tokens are among the most likely ones.

    A token is among the K most likely ones if fewer than K tokens have a greater logit. So only values are compared,
    and equal logits need no order.

    Args:
        tokens_TK: the tokens of each row.
    """

    def __init__(self, tokens_TK: torch.Tensor) -> None:
        self._tokens_TK = tokens_TK
        self._logits_TK = torch.full(tokens_TK.shape, math.nan, device=tokens_TK.device)
        self._highest_TK = torch.full(tokens_TK.shape, -math.inf, device=tokens_TK.device)

    def add(self, z_TC: torch.Tensor, start: int) -> None:
        """Add a slice of the vocabulary that begins at `start`."""
        width, count = z_TC.shape[1], self._tokens_TK.shape[1]
        column = self._tokens_TK - start
        inside = (column >= 0) & (column < width)
        self._logits_TK = torch.where(inside, z_TC.gather(-1, column.clamp(0, width - 1)), self._logits_TK)
        rows, best = in_blocks(z_TC), in_blocks(z_TC).amax(-1)
        higher = best.amax(-1) > self._highest_TK[:, -1]
        # On a GPU the rows are known only on the device; asking for them would wait for it.
        chosen = torch.arange(len(rows), device=z_TC.device) if z_TC.is_cuda else higher.nonzero()[:, 0]
        # The greatest logits are in the blocks with the greatest maxima.
        inside_block = best[chosen].topk(min(count, best.shape[1]), sorted=False).indices
        candidates = rows[chosen[:, None], inside_block].flatten(1)
        both = torch.cat([self._highest_TK[chosen], candidates], -1)
        self._highest_TK[chosen] = both.topk(count).values

    def share(self) -> torch.Tensor:
        """Return the share of each row's tokens that are among the most likely ones, float64, (tokens,)."""
        return (self._logits_TK >= self._highest_TK[:, -1:]).double().mean(-1)
