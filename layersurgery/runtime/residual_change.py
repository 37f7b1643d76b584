"""Measure how much blocks change the direction of the residual stream.

Two cheap importance scores of a block use it: block influence (Men et al., ShortGPT, arXiv 2403.03853, equation 1), and
the angular distance over a span of blocks (Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers,
arXiv 2403.17887, equation 4).
Suffixes of names give shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch


def block_influence(before_BTD: torch.Tensor, after_BTD: torch.Tensor) -> torch.Tensor:
    """Compute the block influence of each token, 1 - cosine: float32, (B, T), from 0 to 2."""
    before, after = _directions(before_BTD), _directions(after_BTD)
    return (before - after).square().sum(-1) / 2  # accurate for small angles, where 1 - cosine would lose digits


def angular_distance(before_BTD: torch.Tensor, after_BTD: torch.Tensor) -> torch.Tensor:
    """Compute the angle between two streams divided by pi, arccos(cosine) / pi: float32, (B, T), from 0 to 1."""
    before, after = _directions(before_BTD), _directions(after_BTD)
    # Kahan's formula: an arc cosine loses all digits at small angles.
    return 2 * torch.atan2((before - after).norm(dim=-1), (before + after).norm(dim=-1)) / math.pi


def _directions(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    length: torch.Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=torch.finfo(torch.float32).tiny)


class SpanDistances:
    """Streams before each of the last few blocks, for comparison with the stream after the current block.

    Args:
        spans: largest number of blocks in a span.
    """

    def __init__(self, spans: int) -> None:
        self._before: deque[tuple[int, torch.Tensor]] = deque(maxlen=spans)

    def add_block(
        self, block: int, before: torch.Tensor, after: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Add a block that has run, and list the spans that end with it.

        Args:
            block: number of the block.
            before: residual stream before the block.
            after: residual stream after the block.

        Yields:
            For each span: number of its first block, its length in blocks, and the stream before it.
        """
        self._before.append((block, before))
        for span, (first, stream) in enumerate(reversed(self._before), 1):
            yield first, span, stream.to(after.device)
