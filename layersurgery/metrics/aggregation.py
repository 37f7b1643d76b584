"""Keep sums of metrics by sequence, and compute means with standard errors.

The unit is the sequence, since tokens inside one sequence are not independent: one float64 sum is kept for each
sequence, route and metric. Sums are added exactly (`math.fsum`), so that any order and any split of the data give the
same digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference import METRICS

Array = npt.NDArray[np.float64]


class MetricSums:
    """Sums of every metric, for every route, by sequence.

    Args:
        routes: number of measured routes.
    """

    def __init__(self, routes: int) -> None:
        self.routes = routes
        self._counts: dict[int, int] = {}
        self._values: dict[int, Array] = {}

    def add(self, sequence: int, count: int, values: Array) -> None:
        """Add one sequence.

        Args:
            sequence: its number.
            count: number of measured positions.
            values: sums over the positions, (routes, len(METRICS)).
        """
        assert sequence not in self._counts, f"sequence {sequence} is counted twice"
        assert values.shape == (self.routes, len(METRICS))
        self._counts[sequence] = count
        self._values[sequence] = values

    def merge(self, other: MetricSums) -> MetricSums:
        """Return the sums over the sequences of both."""
        merged = MetricSums(self.routes)
        for part in (self, other):
            for sequence, count, values in part:
                merged.add(sequence, count, values)
        return merged

    def __iter__(self) -> Iterator[tuple[int, int, Array]]:
        for sequence in sorted(self._counts):
            yield sequence, self._counts[sequence], self._values[sequence]

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def tokens(self) -> int:
        """Return the number of measured positions."""
        return sum(self._counts.values())

    def means(self) -> Array:
        """Return means over all positions, (routes, len(METRICS)); NaN where any position is NaN or infinite."""
        total = self.tokens
        return self._for_each_column(lambda values: _fsum(values) / total)

    def errors(self) -> Array:
        """Return standard errors of the means, over sequences, (routes, len(METRICS)); NaN for a single sequence.

        A mean over positions is a ratio of two sums over sequences, whose lengths may differ. With r the ratio, s a
        sequence's sum and c its count, the error is sqrt(n / (n - 1) * sum (s - r c)^2) / sum c (Cochran, Sampling
        Techniques, 6.3). For sequences of one length it is the standard deviation of their means over sqrt(n).
        """
        counts = [count for _, count, _ in self]
        n, total = len(counts), self.tokens
        if n < 2:
            return np.full((self.routes, len(METRICS)), math.nan)

        def error(values: list[float]) -> float:
            mean = _fsum(values) / total
            spread = _fsum((value - mean * count) ** 2 for value, count in zip(values, counts, strict=True))
            return math.sqrt(n / (n - 1) * spread) / total

        return self._for_each_column(error)

    def _for_each_column(self, function: Any) -> Array:
        stacked = np.stack([values for _, _, values in self])
        flat = stacked.reshape(len(self), -1).T.tolist()
        return np.array([function(column) for column in flat]).reshape(self.routes, len(METRICS))


@dataclass(frozen=True, slots=True)
class SequenceSums:
    """Sums by sequence, for all sequences that have a prediction.

    Attributes:
        numbers: numbers of the sequences in the text.
        counts: predictions in each sequence, (sequences,).
        values: sums of metrics, (sequences, rows, len(METRICS)).
        observed: sums of the observer, (sequences, quantities).
    """

    numbers: list[int]
    counts: Array
    values: Array
    observed: Array

    @classmethod
    def of(cls, batches: Iterable[tuple[int, Sequence[int], Array, Array]]) -> SequenceSums:
        """Make it from batches of (number of the first sequence, counts, values, observed)."""
        ordered = sorted(batches, key=lambda batch: batch[0])
        counts = np.array([count for batch in ordered for count in batch[1]], float)
        values, observed = (np.concatenate([batch[field] for batch in ordered]) for field in (2, 3))
        numbers = [
            first + offset
            for first, batch_counts, _, _ in ordered
            for offset, count in enumerate(batch_counts)
            if count
        ]
        return cls(numbers, counts[counts > 0], values[counts > 0], observed[counts > 0])

    def sums(self, rows: Sequence[int] | None = None) -> MetricSums:
        """Return the sums of metrics; of some rows only, if given."""
        chosen = range(self.values.shape[1]) if rows is None else rows
        sums = MetricSums(len(chosen))
        for number, count, values in zip(self.numbers, self.counts, self.values, strict=True):
            sums.add(number, int(count), values[list(chosen)])
        return sums


def ratio(sums: Array, counts: Array) -> tuple[float, float]:
    """Return a mean over positions, from sums and counts by sequence, both (sequences,), and its standard error.

    The counts may be measured values, too: then the result is a ratio of means. Without counts the mean is NaN; with a
    single sequence the error is NaN. See `MetricSums.errors` for the formula.
    """
    total, n = _fsum(counts), len(counts)
    if not total or not math.isfinite(total):
        return math.nan, math.nan
    mean = _fsum(sums) / total
    if n < 2:
        return mean, math.nan
    spread = _fsum((value - mean * count) ** 2 for value, count in zip(sums.tolist(), counts.tolist(), strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / total


def _fsum(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) if all(map(math.isfinite, listed)) else math.nan
