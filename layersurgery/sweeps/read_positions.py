"""Choose at random the positions at which predictions are read.

The blocks see every token, but the unembedding, which is the larger part of the work for a small model with a large
vocabulary, sees only some of the positions. They are the same for every edit. Each sequence's sums are scaled by its
number of positions over the number that was read, so that means stay unbiased; the spread between sequences, and with
it every standard error, includes what the choice adds.

>>> import torch
>>> from layersurgery.sweeps.read_positions import ReadPositions
>>> quarter = ReadPositions.parse("1/4")
>>> quarter.choose(torch.ones(2, 8, dtype=torch.bool), first=0).sum(-1).tolist()
[2, 2]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional

from ..errors import PlanError


class Reads(Protocol):
    """Choose positions at which predictions are read.

    Attributes:
        scaled: whether sums over the positions that are read stand for all positions.
    """

    scaled: ClassVar[bool]

    def choose(self, positions: torch.Tensor, first: int) -> torch.Tensor:
        """Choose positions of some sequences; see `ReadPositions.choose`."""


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """Hold what is read of a batch, sequence by sequence.

    Attributes:
        positions: where predictions are read, as indices into the flattened batch.
        targets: the true next tokens.
        counts: number of positions of each sequence of the text.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, ids: torch.Tensor, reads: torch.Tensor, length: int) -> ReadTokens:
        """Make it of sequences that are run as they are.

        Args:
            ids: tokens, (sequences, length).
            reads: True for positions at which predictions are read; each has a next token, (sequences, length - 1).
            length: number of positions that are run; the last token may not be.
        """
        positions = functional.pad(reads, (0, length - reads.shape[1])).flatten().nonzero()[:, 0]
        return cls(positions, ids[:, 1:][reads], reads.sum(-1).tolist())


@dataclass(frozen=True, slots=True)
class ScoredPositions:
    """Choose the positions that a text scores, such as the answers to questions; other positions do not count.

    Attributes:
        scored: True for a token whose prediction is read one position before, (sequences, length).
    """

    scored: torch.Tensor
    scaled: ClassVar = False

    def choose(self, positions: torch.Tensor, first: int) -> torch.Tensor:
        """Return the scored positions of some sequences, as `ReadPositions.choose` does."""
        sequences, length = positions.shape
        return positions & self.scored[first : first + sequences, 1 : length + 1]


@dataclass(frozen=True, slots=True)
class ReadPositions:
    """Random choice of positions of each sequence.

    Attributes:
        share: share of a sequence's positions, rounded up; or their number, if it is a whole number.
        seed: seed of the choice. It depends on the seed and on the sequence's number in the text alone.
    """

    share: Fraction | int
    seed: int = 0
    scaled: ClassVar = True

    @classmethod
    def parse(cls, read: str | float, seed: int = 0) -> ReadPositions:
        """Parse "1/4", 0.25 (a share of the positions) or 64 (positions of each sequence).

        Raises:
            PlanError: it is neither a share between 0 and 1 nor a whole number of at least 1.
        """
        try:
            value = Fraction(str(read).strip())
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if 0 < value < 1:
            return cls(value, seed)
        if value >= 1 and str(read).strip().isdigit():
            return cls(int(value), seed)
        raise PlanError(
            f"`read` is a share of the positions, such as 1/4, or a number of positions of each sequence, such as 64; "
            f"not {read!r}"
        )

    def __str__(self) -> str:
        return f"{self.share} of the positions" if isinstance(self.share, Fraction) else f"{self.share} positions"

    def number(self, count: int) -> int:
        """Return how many of `count` positions are read."""
        return math.ceil(count * self.share) if isinstance(self.share, Fraction) else min(count, self.share)

    def choose(self, positions: torch.Tensor, first: int) -> torch.Tensor:
        """Choose positions of some sequences.

        Args:
            positions: True where a prediction may be read, (sequences, length).
            first: the first sequence's number in the text.

        Returns:
            True where a prediction is read, the same shape.
        """
        chosen = torch.zeros_like(positions)
        for number, row in enumerate(positions):
            candidates = row.nonzero()[:, 0].numpy()
            drawn = np.random.default_rng([self.seed, first + number]).permutation(len(candidates))
            chosen[number, candidates[drawn[: self.number(len(candidates))]]] = True
        return chosen
