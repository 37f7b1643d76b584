"""Keep sums of metrics by sequence, and compute means with standard errors.

The unit is the sequence, since tokens inside one sequence are not independent: one float64 sum is kept for each
sequence, route and metric. Sums are added exactly (`math.fsum`), so that any order and any split of the data give the
same digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from .tails import SUMS, Tails

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Result of one batch.

    Attributes:
        first: number of its first sequence in the text.
        counts: number of positions measured in each sequence.
        values: sums over these positions, (sequences, rows, len(METRICS)). Row 0 is the unedited model, the others are
            the variants. NaN in rows that were not measured.
        observed: counts and sums of the observer, (sequences, the observer's size).
        seconds: time that the batch took.
        calls: number of block calls.
        states_at_peak: largest number of residual streams that were in memory together.
        bytes_read: bytes of offloaded weights that were loaded.
        max_sequences: number of sequences that fit into memory; None if memory never ran out.
        token_metrics: metrics at each position, (len(METRICS), positions), by rows of the result that share them; empty
            if they are not wanted.
        rows: the rows that were measured; None for all.
        tails: what the columns of the tails are made from; None if they are not wanted.
    """

    first: int
    counts: list[int]
    values: Array
    observed: Array
    seconds: float = 0
    calls: int = 0
    states_at_peak: int = 0
    bytes_read: int = 0
    max_sequences: int | None = None
    token_metrics: dict[tuple[int, ...], torch.Tensor] | None = None
    rows: tuple[int, ...] | None = None
    tails: Tails | None = None

    def has(self, row: int) -> bool:
        """Return whether a row was measured."""
        return self.rows is None or row in self.rows

    def merge(self, other: BatchResult) -> BatchResult:
        """Return this result with the rows that another measurement of the same batch adds."""
        if self.rows is None:
            return self
        values = self.values.copy()
        added = [row for row in range(values.shape[1]) if other.has(row) and not self.has(row)]
        values[:, added] = other.values[:, added]
        rows = None if other.rows is None else tuple(sorted({*self.rows, *added}))
        tails = self.tails if other.tails is None or self.tails is None else self.tails.with_rows(added, other.tails)
        return replace(
            self,
            values=values,
            rows=rows,
            seconds=self.seconds + other.seconds,
            calls=self.calls + other.calls,
            tails=tails,
        )

    @classmethod
    def concatenate(cls, results: Sequence[BatchResult]) -> BatchResult:
        """Return the results of consecutive parts of a batch as one result."""
        parts = [result.token_metrics for result in results if result.token_metrics]
        tails = [result.tails for result in results if result.tails is not None]
        return cls(
            results[0].first,
            [count for result in results for count in result.counts],
            np.concatenate([result.values for result in results]),
            np.concatenate([result.observed for result in results]),
            sum(result.seconds for result in results),
            sum(result.calls for result in results),
            max(result.states_at_peak for result in results),
            sum(result.bytes_read for result in results),
            results[-1].max_sequences,
            {rows: torch.cat([part[rows] for part in parts], -1) for rows in parts[0]} if parts else None,
            results[0].rows,
            Tails.join(tails) if tails else None,
        )


@dataclass(frozen=True, slots=True)
class SequenceSums:
    """Sums by sequence, for all sequences that have a prediction.

    Attributes:
        numbers: numbers of the sequences in the text.
        counts: predictions in each sequence, (sequences,).
        values: sums of metrics, (sequences, rows, len(METRICS)).
        observed: sums of the observer, (sequences, quantities).
        used: whether a row uses a sequence, (sequences, rows); None if every row uses all.
        tails: what the columns of the tails are made from; None if they were not measured.
    """

    numbers: list[int]
    counts: Array
    values: Array
    observed: Array
    used: npt.NDArray[np.bool_] | None = None
    tails: Tails | None = None

    @classmethod
    def of(cls, results: Iterable[BatchResult], used: Sequence[npt.NDArray[np.bool_]] | None = None) -> SequenceSums:
        """Make it from the results of batches.

        Args:
            results: the results; in any order if every row uses all.
            used: for each result, whether a row uses it, (rows,).
        """
        results = list(results)
        if used is not None:
            sums = cls.of(results)
            flags = [flag for result, flag in zip(results, used, strict=True) for count in result.counts if count]
            if np.all(flags):
                return sums
            return replace(sums, used=np.array(flags), tails=_join_tails(results, used))
        ordered = sorted(results, key=lambda result: result.first)
        numbers = [result.first + offset for result in ordered for offset, count in enumerate(result.counts) if count]
        assert len(set(numbers)) == len(numbers), "a sequence is counted twice"
        counts = np.array([count for result in ordered for count in result.counts], float)
        values, observed = (
            np.concatenate([getattr(result, name) for result in ordered]) for name in ("values", "observed")
        )
        tails = _join_tails(ordered)
        return cls(numbers, counts[counts > 0], values[counts > 0], observed[counts > 0], tails=tails)

    def rows(self, rows: Sequence[int]) -> SequenceSums:
        """Return the sums of some rows."""
        chosen = list(rows)
        used = None if self.used is None else self.used[:, chosen]
        tails = None if self.tails is None else self.tails.rows(chosen)
        return replace(self, values=self.values[:, chosen], used=used, tails=tails)

    def of_row(self, row: int) -> tuple[Array, Array]:
        """Return a row's sums, (sequences, len(METRICS)), and counts, (sequences,), of the sequences that it uses."""
        chosen = slice(None) if self.used is None else self.used[:, row]
        return self.values[chosen, row], self.counts[chosen]

    def tail_columns(self, row: int) -> dict[str, float]:
        """Return a row's columns of the tails, by their names; none if they were not measured."""
        if self.tails is None:
            return {}
        chosen = slice(None) if self.used is None else self.used[:, row]
        values, counts = self.tails.values[chosen, row], self.counts[chosen]
        square, overlap = (ratio(values[:, column], counts) for column in range(len(SUMS)))
        return self.tails.columns(row, values, square, overlap)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def tokens(self) -> int:
        """Return the number of measured positions."""
        return int(self.counts.sum())

    def means_and_errors(self) -> tuple[Array, Array]:
        """Return means over all positions and their standard errors over sequences, each (rows, len(METRICS)).

        See `ratio` for what is NaN.
        """
        _, rows, metrics = self.values.shape
        pairs = np.empty((rows, metrics, 2))
        for row in range(rows):
            values, counts = self.of_row(row)
            pairs[row] = [ratio(column, counts) for column in values.T]
        return pairs[..., 0], pairs[..., 1]


def _join_tails(results: Sequence[BatchResult], used: Sequence[npt.NDArray[np.bool_]] | None = None) -> Tails | None:
    """Return the tails of all sequences that have a prediction, or of those that a row uses; None without tails."""
    parts = [result.tails.select(np.array(result.counts) > 0) for result in results if result.tails is not None]
    return Tails.join(parts, used) if parts and len(parts) == len(results) else None


def ratio(sums: Array, counts: Array) -> tuple[float, float]:
    """Return a mean over positions, from sums and counts by sequence, both (sequences,), and its standard error.

    A mean over positions is a ratio of two sums over sequences, whose lengths may differ. With r the ratio, s a
    sequence's sum and c its count, the error is sqrt(n / (n - 1) * sum (s - r c)^2) / sum c (Cochran, Sampling
    Techniques, 6.3). For sequences of one length it is the standard deviation of their means over sqrt(n).

    The counts may be measured values, too: then the result is a ratio of means. The mean is NaN without counts, and
    where any value is NaN or infinite; the error is NaN for a single sequence, too.
    """
    values, weights = sums.tolist(), counts.tolist()
    total, n = _fsum(weights), len(weights)
    if not total or not math.isfinite(total):
        return math.nan, math.nan
    mean = _fsum(values) / total
    if n < 2:
        return mean, math.nan
    spread = _fsum((value - mean * count) ** 2 for value, count in zip(values, weights, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / total


def _fsum(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) if all(map(math.isfinite, listed)) else math.nan
