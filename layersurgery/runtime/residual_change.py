"""How much the residual stream turns on its way through blocks.

Two cheap scores of what a block is worth come from it: block influence (Men et al., ShortGPT, arXiv 2403.03853, equation 1), and the
angular distance over a span of blocks (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, equation 4).
Names say shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch


def block_influence(before_BTD: torch.Tensor, after_BTD: torch.Tensor) -> torch.Tensor:
    """Block influence of each token, 1 - cosine: float32, (B, T), from 0 to 2."""
    before, after = _directions(before_BTD), _directions(after_BTD)
    return (before - after).square().sum(-1) / 2  # exact where 1 - cosine would cancel


def angular_distance(before_BTD: torch.Tensor, after_BTD: torch.Tensor) -> torch.Tensor:
    """Angle between two streams as a share of half a turn, arccos(cosine) / pi: float32, (B, T), from 0 to 1."""
    before, after = _directions(before_BTD), _directions(after_BTD)
    # Kahan's form: an arc cosine has no digits left where the angle is small.
    return 2 * torch.atan2((before - after).norm(dim=-1), (before + after).norm(dim=-1)) / math.pi


def _directions(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    length: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=torch.finfo(torch.float32).tiny)


class SpanDistances:
    """The streams before the last few blocks, to compare with the one behind them.

    Args:
        spans: how many blocks back, at most.
    """

    def __init__(self, spans: int) -> None:
        self._before: deque[tuple[int, torch.Tensor]] = deque(maxlen=spans)

    def add_block(
        self, block: int, before: torch.Tensor, after: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """A block has run: for each span that it ends, its first block, its length, and the stream before it."""
        self._before.append((block, before))
        for span, (first, stream) in enumerate(reversed(self._before), 1):
            yield first, span, stream.to(after.device)
