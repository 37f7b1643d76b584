"""Reduce the logits tile by tile, on any device; a tokens x vocabulary tensor never exists.

Suffixes of names give shapes: T tokens, D width of the readout's input, V vocabulary, C one slice of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..runtime.unembedding import Readout
from .top_tokens import BLOCK, Overlap, TopTokens, first_argmax, in_blocks

# A tile and its weights stay in the processor's caches while they are used.
TILE_ELEMENTS = 1 << 22
# A GPU runs several kernels for each tile. Larger tiles keep it busy while the next kernel starts.
CUDA_TILE_ELEMENTS = 1 << 25
ROWS = 2048

Tensors = tuple[torch.Tensor, ...]
Reduce = Callable[[torch.Tensor], Tensors]


@dataclass(frozen=True, slots=True)
class LogitStats:
    """Statistics of one model's logits: float64, (tokens,).

    Attributes:
        lse: log-sum-exp, nats.
        entropy: of the distribution, nats.
        loss: cross-entropy with the true next token, nats.
        top: the most likely token; the lowest one of equals.
        confidence: the probability of the most likely token.
        overlap: the share of given tokens that are among the most likely ones; None if none were given.
    """

    lse: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    top: torch.Tensor
    confidence: torch.Tensor
    overlap: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        m: torch.Tensor,
        S: torch.Tensor,
        A: torch.Tensor,
        target: torch.Tensor,
        top: torch.Tensor,
        overlap: torch.Tensor | None = None,
    ) -> LogitStats:
        """Make the statistics from sums.

        They are the greatest logit m, S = sum e^(z-m), A = sum e^(z-m) (z-m), the target's logit and the index of m.
        The entropy is log S - A/S.
        """
        lse = m + S.log()
        return cls(lse, S.log() - A / S, lse - target, top, 1 / S, overlap)


def logit_stats(
    readout: Readout,
    x_TD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    compiled: bool = False,
    top_TK: torch.Tensor | None = None,
) -> LogitStats:
    """Compute the statistics of the logits at some positions.

    Args:
        readout: the model's readout.
        x_TD: the output of `readout.normalize`.
        target_T: the true next tokens.
        compiled: reduce a tile with a loop compiled by torch.
        top_TK: tokens whose share among the most likely ones is wanted, (tokens, K); None for none.
    """
    reduce = _reduce_any if readout.tokens_at_once is not None else _reduce_compiled if compiled else _reduce
    parts = []
    for rows in rows_of(readout, len(x_TD)):
        overlap = None if top_TK is None else Overlap(top_TK[rows])
        sums = _sum_rows(readout, x_TD[rows], target_T[rows], reduce, overlap)
        parts.append(sums if overlap is None else (*sums, overlap.share()))
    return LogitStats.of(*(torch.cat(column) for column in zip(*parts, strict=True)))


def top_tokens(readout: Readout, x_TD: torch.Tensor) -> torch.Tensor:
    """Find the most likely tokens at some positions, the lowest ones of equals: (tokens, K), the most likely first.

    Args:
        readout: the model's readout.
        x_TD: the output of `readout.normalize`.
    """
    parts = []
    for rows in rows_of(readout, len(x_TD)):
        found = TopTokens()
        for start, stop in slices(readout, x_TD[rows]):
            found.add(readout.logits_tile(x_TD[rows], start, stop), start)
        parts.append(found.tokens_TK)
    return torch.cat(parts)


def rows_of(readout: Readout, tokens: int) -> Iterator[slice]:
    """Yield slices of the tokens."""
    step = readout.tokens_at_once or ROWS
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def tile_elements(device: torch.device) -> int:
    """Return the number of logits in a tile on a device."""
    return CUDA_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


def slices(readout: Readout, x_TD: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) slices of the vocabulary for some rows of the readout's input."""
    step = readout.vocabulary
    if readout.tokens_at_once is None:
        step = max(1, tile_elements(x_TD.device) // max(1, len(x_TD)))
    if step > BLOCK:
        step -= step % BLOCK
    for start in range(0, readout.vocabulary, step):
        yield start, min(start + step, readout.vocabulary)


def _sum_rows(
    readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, reduce: Reduce, overlap: Overlap | None
) -> Tensors:
    """Compute m, S, A, the target's logit and the index of m, as `LogitStats.of` takes them, and add to the overlap."""
    m = S = A = target = top = torch.empty(0)
    for start, stop in slices(readout, x_TD):
        z_TC = readout.logits_tile(x_TD, start, stop)
        column = target_T.to(z_TC.device) - start
        inside = (column >= 0) & (column < stop - start)
        target_logit = z_TC.gather(-1, column.clamp(0, stop - start - 1)[:, None])[:, 0].double()
        if overlap is not None:  # before the logits are reduced in place
            overlap.add(z_TC, start)
        best, *parts = reduce(z_TC)
        peak, part_S, part_A = (part.double() for part in parts)
        if start == 0:
            m, S, A, top = peak, part_S, part_A, first_argmax(z_TC, best)
            target = torch.where(inside, target_logit, torch.full_like(target_logit, math.nan))
        else:
            # The first of equal logits wins, as in argmax. NaN must win over a number.
            higher = (peak > m) | (peak.isnan() & ~m.isnan())
            if z_TC.is_cuda:  # the rows are known only on the device; asking for them would wait for it
                top = torch.where(higher, first_argmax(z_TC, best) + start, top)
            else:
                rows = higher.nonzero()[:, 0]
                top[rows] = first_argmax(z_TC[rows], best[rows]) + start
            m, S, A = merge(m, S, A, peak, part_S, part_A)
            target = torch.where(inside, target_logit, target)
        del z_TC  # frees the memory for the next tile
    return m, S, A, target, top


def merge(
    m: torch.Tensor, S: torch.Tensor, A: torch.Tensor, peak: torch.Tensor, part_S: torch.Tensor, part_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the maximum, S and A of two parts of the vocabulary."""
    new = torch.maximum(m, peak)
    old_factor, part_factor = (m - new).exp(), (peak - new).exp()
    A = old_factor * (A + (m - new) * S) + part_factor * (part_A + (peak - new) * part_S)
    return new, old_factor * S + part_factor * part_S, A


def _reduce(z_TC: torch.Tensor) -> Tensors:
    """Return the maximum of each block of columns, the maximum of each row, S and A; subtracts the maximum in place."""
    blocks = in_blocks(z_TC)
    best = blocks.amax(-1)
    peak = best.amax(-1)
    z_TC.sub_(peak[:, None])
    e_TC = z_TC.exp()
    return best, peak, e_TC.sum(-1), e_TC.mul_(z_TC).sum(-1)


def _reduce_any(z_TV: torch.Tensor) -> Tensors:
    """Return the same for logits of the model's own head, which may be minus infinity for unused tokens."""
    best = in_blocks(z_TV).amax(-1)
    peak = best.amax(-1)
    shifted = z_TV - peak[:, None]
    e_TV = shifted.exp()
    return best, peak, e_TV.sum(-1), e_TV.mul_(torch.where(e_TV == 0, 0.0, shifted)).sum(-1)


def _reduce_compiled(z_TC: torch.Tensor) -> Tensors:
    """Return the same as `_reduce`, in one loop over memory."""
    if z_TC.shape[1] % BLOCK:
        return _reduce(z_TC)
    with torch.compiler.set_stance("default"):
        best, S, A = _compiled(z_TC.device.type)(z_TC)
    return best, best.amax(-1), S, A


def _loop(z_TC: torch.Tensor) -> Tensors:
    best = z_TC.view(z_TC.shape[0], -1, BLOCK).amax(-1)
    z_TC = z_TC - best.amax(-1, keepdim=True)
    e_TC = z_TC.exp()
    return best, e_TC.sum(-1), (e_TC * z_TC).sum(-1)


@lru_cache
def _compiled(device: str) -> Reduce:
    loop = torch.compile(_loop, dynamic=True, fullgraph=True)
    # Compile for a fixed first shape, so that the result does not depend on the first call; rows and columns differ so
    # that torch does not assume that they are equal.
    loop(torch.zeros(2047, 2048, device=device))
    return loop


def kl_cross_term(readout: Readout, x_TD: torch.Tensor, p: LogitStats, p_x_TD: torch.Tensor) -> torch.Tensor:
    """Compute sum_v p_v (z_p - z_q), float64, from the logits of both models."""
    parts = []
    for rows in rows_of(readout, len(x_TD)):
        sums = torch.zeros_like(p.lse[rows])
        for start, stop in slices(readout, x_TD[rows]):
            p_TC, q_TC = readout.logits_tile(p_x_TD[rows], start, stop), readout.logits_tile(x_TD[rows], start, stop)
            weight = (p_TC - p.lse[rows, None].to(p_TC.device)).exp_()
            sums += torch.where(weight == 0, 0.0, weight * (p_TC - q_TC)).sum(-1).double()
        parts.append(sums)
    return torch.cat(parts)
