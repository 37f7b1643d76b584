"""Race edits against each other, to find those that change predictions least without measuring all of them in full.

Two edits are compared by the differences of their sums on the same sequences, which vary much less than the sums. An
edit that is surely not among the lowest leaves the race, and so does one that surely is. The comparisons hold at every
number of sequences together, and the probability that any of them is wrong is about `ERROR` or less.

>>> import numpy as np
>>> from layersurgery.metrics.reference import METRICS
>>> from layersurgery.sweeps.race import Race
>>> kl = np.random.default_rng(0).normal([0, 3.0, 1.0, 2.0], 0.1, (16, 4))  # row 0 is the unedited model
>>> values = np.zeros((16, 4, len(METRICS)))
>>> values[..., METRICS.index("kl_nats")] = 10 * kl
>>> race = Race(lowest=2)
>>> sorted(race.finished(values, np.full(16, 10.0), [1, 2, 3])), sorted(race.winners)
([1, 2, 3], [2, 3])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..metrics.aggregation import Array
from ..metrics.intervals import asymptotic_errors
from ..metrics.reference import METRICS

ERROR = 0.05
"""Probability that a race, which may end at any time, removes one of the lowest or keeps one that is not.

It is approximate, as the intervals that compare edits are; differences with a long tail need more sequences.
"""
MIN_SEQUENCES = 16
"""Number of sequences that a race waits for before it removes anything."""


@dataclass(slots=True)
class Race:
    """Rule that lets edits leave once it is sure whether they are among the lowest.

    Attributes:
        lowest: how many edits with the lowest values are to be found.
        metric: the metric that is compared.
        error: probability that any comparison is wrong.
        winners: rows that are surely among the lowest.
        losers: rows that surely are not.
    """

    lowest: int
    metric: str = "kl_nats"
    error: float = ERROR
    winners: set[int] = field(default_factory=set)
    losers: set[int] = field(default_factory=set)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records: how many are searched, by what, and the error probability."""
        return {"lowest": self.lowest, "metric": self.metric, "error": self.error}

    def outcome(self, row: int) -> str:
        """Return what is sure of a row: "lowest", "higher", or "open" for one that the text did not decide."""
        return "lowest" if row in self.winners else "higher" if row in self.losers else "open"

    def finished(self, values: Array, counts: Array, rows: Sequence[int]) -> set[int]:
        """Return the rows of which it is sure whether they are among the lowest.

        Args:
            values: sums by sequence of all rows, (sequences, rows, len(METRICS)).
            counts: positions of each sequence, (sequences,), none of them 0.
            rows: the rows that are still measured.
        """
        racing = list(rows)
        if len(counts) >= MIN_SEQUENCES:
            sums = values[:, :, METRICS.index(self.metric)]
            broken = [row for row in racing if not np.isfinite(sums[:, row]).all()]
            self.losers.update(broken)  # a value that is not finite is not among the lowest
            racing = [row for row in racing if row not in broken]
            self._compare(sums, counts, racing)
        return set(rows) & (self.winners | self.losers)

    def _compare(self, sums: Array, counts: Array, racing: list[int]) -> None:
        """Decide about as many of the racing rows as possible."""
        contenders = len(racing) + len(self.winners) + len(self.losers)
        # A row is judged wrongly only if a comparison of one of the lowest with one of the others is wrong, since there
        # are too few rows on its own side. Each interval misses to one side with half of its error probability.
        pairs = max(1, self.lowest * (contenders - self.lowest))
        is_lower = surely_lower(sums[:, racing], counts, 1 - 2 * self.error / max(2, pairs))
        places = self.lowest - len(self.winners)
        while racing:
            better, worse = is_lower.sum(0), is_lower.sum(1)
            out = better >= places
            winning = (worse >= len(racing) - places) & ~out
            if not (out | winning).any():
                return
            self.losers.update(np.array(racing)[out].tolist())
            self.winners.update(np.array(racing)[winning].tolist())
            left = ~(out | winning)
            racing = [row for row, is_left in zip(racing, left, strict=True) if is_left]
            is_lower = is_lower[np.ix_(left, left)]
            places -= int(winning.sum())


def surely_lower(sums: Array, counts: Array, confidence: float) -> npt.NDArray[np.bool_]:
    """Return whether each row's mean is surely lower than each other's, from their differences by sequence.

    Args:
        sums: sums by sequence, (sequences, rows).
        counts: positions of each sequence, (sequences,).
        confidence: of each comparison, which holds at every number of sequences together.

    Returns:
        (rows, rows): whether the mean of the first is lower than that of the second.
    """
    n = len(counts)
    means = sums.sum(0) / counts.sum()
    residuals = sums - means * counts[:, None]  # those of a difference are the differences of these
    products = residuals.T @ residuals
    squares = np.diag(products)
    spread = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
    errors = np.sqrt(n / (n - 1) * spread) / counts.sum()
    return np.asarray(means[:, None] - means[None, :] + errors * asymptotic_errors(n, confidence) < 0)
