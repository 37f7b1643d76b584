"""One pass over the logits, tile by tile, on any device; tokens x vocabulary is never in memory.

Names say shapes: T tokens, D width of what is read, V vocabulary, C one slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..runtime.unembedding import Readout

# A tile and the weights it came from stay in a processor's caches while they are worked on.
TILE_ELEMENTS = 1 << 22
ROWS = 2048
_BLOCK = 64

Tensors = tuple[torch.Tensor, ...]
Weigh = Callable[[torch.Tensor], Tensors]


@dataclass(frozen=True, slots=True)
class LogitStats:
    """What is kept of one model's logits: float64, (tokens,).

    Attributes:
        lse: log-sum-exp, nats.
        entropy: of the distribution, nats.
        loss: cross-entropy with the true next token, nats.
        top: the most likely token; the lowest, where several are equal.
    """

    lse: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(
        cls, m: torch.Tensor, S: torch.Tensor, A: torch.Tensor, wanted: torch.Tensor, top: torch.Tensor
    ) -> LogitStats:
        """From the greatest logit m, S = sum e^(z-m), A = sum e^(z-m) (z-m), the target's logit and the place of m: entropy is log S - A/S."""
        lse = m + S.log()
        return cls(lse, S.log() - A / S, lse - wanted, top)


def logit_stats(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, *, compiled: bool = False) -> LogitStats:
    """Read some positions.

    Args:
        readout: how to read.
        x_TD: what `readout.final` gave.
        target_T: the true next tokens.
        compiled: sum up a tile with a loop that torch compiles.
    """
    weigh = _weigh_all if readout.rows is not None else _weigh_compiled if compiled else _weigh
    parts = [_of_rows(readout, x_TD[rows], target_T[rows], weigh) for rows in rows_of(readout, len(x_TD))]
    return LogitStats.of(*(torch.cat(column) for column in zip(*parts, strict=True)))


def rows_of(readout: Readout, tokens: int) -> Iterator[slice]:
    """The tokens, some at a time."""
    step = readout.rows or ROWS
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def slices(readout: Readout, tokens: int) -> Iterator[tuple[int, int]]:
    """The vocabulary, for so many tokens, a slice at a time."""
    step = readout.vocabulary if readout.rows is not None else max(1, TILE_ELEMENTS // max(1, tokens))
    if step > _BLOCK:
        step -= step % _BLOCK
    for start in range(0, readout.vocabulary, step):
        yield start, min(start + step, readout.vocabulary)


def _of_rows(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, weigh: Weigh) -> Tensors:
    """Running m, S and A, the target's logit and the place of m, as `Summary.of` takes them."""
    m = S = A = wanted = top = torch.empty(0)
    for start, stop in slices(readout, len(x_TD)):
        z_TC = readout.logits_tile(x_TD, start, stop)
        here = target_T.to(z_TC.device) - start
        inside = (here >= 0) & (here < stop - start)
        hit = z_TC.gather(-1, here.clamp(0, stop - start - 1)[:, None])[:, 0].double()
        best, *parts = weigh(z_TC)
        peak, part_S, part_A = (part.double() for part in parts)
        if start == 0:
            m, S, A, top = peak, part_S, part_A, _place(z_TC, best)
            wanted = torch.where(inside, hit, torch.full_like(hit, math.nan))
        else:
            # The first of equal ones wins, as in argmax; NaN must not lose against a number.
            higher = (peak > m) | (peak.isnan() & ~m.isnan())
            if z_TC.is_cuda:  # which rows these are, only the device knows
                top = torch.where(higher, _place(z_TC, best) + start, top)
            else:
                rows = higher.nonzero()[:, 0]
                top[rows] = _place(z_TC[rows], best[rows]) + start
            m, S, A = merged(m, S, A, peak, part_S, part_A)
            wanted = torch.where(inside, hit, wanted)
        del z_TC  # so that the next tile can have its memory
    return m, S, A, wanted, top


def merged(
    m: torch.Tensor, S: torch.Tensor, A: torch.Tensor, peak: torch.Tensor, part_S: torch.Tensor, part_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximum, S and A of two parts of the vocabulary together."""
    new = torch.maximum(m, peak)
    old_by, part_by = (m - new).exp(), (peak - new).exp()
    A = old_by * (A + (m - new) * S) + part_by * (part_A + (peak - new) * part_S)
    return new, old_by * S + part_by * part_S, A


def _weigh(z_TC: torch.Tensor) -> Tensors:
    """Greatest logit of each block of columns, greatest of all, S and A of a tile, from which the greatest is subtracted."""
    blocks = _blocks(z_TC)
    best = blocks.amax(-1)
    peak = best.amax(-1)
    z_TC.sub_(peak[:, None])
    e_TC = z_TC.exp()
    return best, peak, e_TC.sum(-1), e_TC.mul_(z_TC).sum(-1)


def _weigh_all(z_TV: torch.Tensor) -> Tensors:
    """The same for logits of the model's own making, which may give minus infinity to tokens that do not exist."""
    best = _blocks(z_TV).amax(-1)
    peak = best.amax(-1)
    shifted = z_TV - peak[:, None]
    e_TV = shifted.exp()
    return best, peak, e_TV.sum(-1), e_TV.mul_(torch.where(e_TV == 0, 0.0, shifted)).sum(-1)


def _weigh_compiled(z_TC: torch.Tensor) -> Tensors:
    """The same as `_weigh`, in one loop over memory."""
    if z_TC.shape[1] % _BLOCK:
        return _weigh(z_TC)
    with torch.compiler.set_stance("default"):
        best, S, A = _compiled()(z_TC)
    return best, best.amax(-1), S, A


def _blocks(z_TC: torch.Tensor) -> torch.Tensor:
    """(T, blocks, columns): one block where the width is no multiple of a block's."""
    width = z_TC.shape[1]
    block = width if width % _BLOCK else _BLOCK
    return z_TC.reshape(len(z_TC), width // block, block)


def _place(z_TC: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """First place of the greatest logit of each row. A maximum is vectorised, its place is not: so that is sought in one block."""
    blocks = _blocks(z_TC)
    block = best.argmax(-1)
    inside = blocks[torch.arange(len(blocks), device=z_TC.device), block]
    return block * blocks.shape[2] + inside.argmax(-1)


def _loop(z_TC: torch.Tensor) -> Tensors:
    best = z_TC.view(z_TC.shape[0], -1, _BLOCK).amax(-1)
    z_TC = z_TC - best.amax(-1, keepdim=True)
    e_TC = z_TC.exp()
    return best, e_TC.sum(-1), (e_TC * z_TC).sum(-1)


@lru_cache(1)
def _compiled() -> Weigh:
    loop = torch.compile(_loop, dynamic=True, fullgraph=True)
    # What it is made for does not depend on what is read first; nor are rows and columns taken for the same number.
    loop(torch.zeros(2047, 2048))
    return loop


def kl_cross_term(readout: Readout, x_TD: torch.Tensor, p: LogitStats, p_x_TD: torch.Tensor) -> torch.Tensor:
    """sum_v p_v (z_p - z_q), float64, with the logits of both models side by side."""
    parts = []
    for rows in rows_of(readout, len(x_TD)):
        sums = torch.zeros_like(p.lse[rows])
        for start, stop in slices(readout, rows.stop - rows.start):
            p_TC, q_TC = readout.logits_tile(p_x_TD[rows], start, stop), readout.logits_tile(x_TD[rows], start, stop)
            weight = (p_TC - p.lse[rows, None].to(p_TC.device)).exp_()
            sums += torch.where(weight == 0, 0.0, weight * (p_TC - q_TC)).sum(-1).double()
        parts.append(sums)
    return torch.cat(parts)
