"""Keep what people who judge quantizations read: how KL is distributed over tokens, and how probabilities change.

Each row of a batch has a histogram of KL with bins of one ratio, from which quantiles are read, and the counts of the
calibration error. They are whole numbers, so any order and any split of the data give the same digits. Each sequence
has sums, as for the metrics.

>>> from layersurgery.metrics.tails import KL_ERROR, KL_LEAST
>>> print(f"quantiles are off by at most {100 * KL_ERROR:.1f} %; below {KL_LEAST:.0e} nats they are 0")
quantiles are off by at most 2.2 %; below 6e-08 nats they are 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from ..registry import KL_QUANTILES
from .reference import METRICS, TOKEN_TAILS

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer]

SUMS = ("probability_change_squared", "top5_overlap")
"""Sums over the positions of each sequence; after them, the values of a sequence have its greatest KL."""
_BINS_PER_OCTAVE = 16
KL_LEAST, KL_MOST = 2.0**-24, 2.0**10
"""Nats; float32 logits do not tell a smaller KL from zero."""
_EDGES = torch.tensor(
    [KL_LEAST * 2 ** (edge / _BINS_PER_OCTAVE) for edge in range(34 * _BINS_PER_OCTAVE + 1)], dtype=torch.float64
)
assert _EDGES[-1] == KL_MOST
KL_ERROR = 2 ** (0.5 / _BINS_PER_OCTAVE) - 1
"""Largest relative error of a quantile: half a bin."""
CALIBRATION_BINS = 15
# Confidences are added as multiples of this number, so that their sums are exact: 2^31 of them fit.
_CONFIDENCE_UNIT = 2.0**-32


@dataclass(frozen=True, slots=True)
class Tails:
    """Hold sums and counts of some text, for each row of a result.

    Attributes:
        values: sums (`SUMS`) and the greatest KL, (sequences, rows, len(SUMS) + 1); NaN in rows that were not measured.
        kl: number of positions in each bin of KL, (rows, bins). The first bin is of all smaller values, the last one of
            all greater ones.
        calibration: (rows, CALIBRATION_BINS, 3): for each bin of confidence the number of positions, of those where the
            most likely token is the true one, and the sum of the confidences, in multiples of 2^-32.
    """

    values: Array
    kl: Counts
    calibration: Counts

    @classmethod
    def empty(cls, sequences: int, rows: int) -> Tails:
        """Return the tails of sequences without predictions."""
        kl, calibration = np.zeros((rows, len(_EDGES) + 1), int), np.zeros((rows, CALIBRATION_BINS, 3), int)
        return cls(np.zeros((sequences, rows, len(SUMS) + 1)), kl, calibration)

    @classmethod
    def stack(cls, of_rows: Mapping[int, Sequence[torch.Tensor]], sequences: int, rows: int) -> Tails:
        """Make it from what `row_tails` returned for each row that was measured."""
        found = cls.empty(sequences, rows)
        found.values[:] = np.nan
        for row, (values, kl, calibration) in of_rows.items():
            found.values[:, row] = values.cpu().numpy()
            found.kl[row], found.calibration[row] = kl.cpu().numpy(), calibration.cpu().numpy()
        return cls(found.values, _narrow(found.kl), found.calibration)

    def with_rows(self, rows: Sequence[int], other: Tails) -> Tails:
        """Return the same with these rows of another measurement of the same text."""
        values, kl, calibration = self.values.copy(), self.kl.astype(int), self.calibration.copy()
        values[:, rows] = other.values[:, rows]
        kl[rows], calibration[rows] = other.kl[rows], other.calibration[rows]
        return Tails(values, _narrow(kl), calibration)

    @classmethod
    def join(cls, parts: Sequence[Tails], used: Sequence[npt.NDArray[np.bool_]] | None = None) -> Tails:
        """Return the tails of several texts together, their sequences in this order.

        Args:
            parts: the tails of each text.
            used: for each of them, whether a row uses it, (rows,); None if every row uses all.
        """
        factors = np.ones((len(parts), len(parts[0].kl)), int) if used is None else np.array(used, int)
        kl, calibration = np.zeros(parts[0].kl.shape, int), np.zeros(parts[0].calibration.shape, int)
        for part, factor in zip(parts, factors, strict=True):
            kl += factor[:, None] * part.kl
            calibration += factor[:, None, None] * part.calibration
        return cls(np.concatenate([part.values for part in parts]), _narrow(kl), calibration)

    def select(self, sequences: npt.NDArray[np.bool_]) -> Tails:
        """Return the same without sequences that have no predictions, which count nowhere."""
        return Tails(self.values[sequences], self.kl, self.calibration)

    def rows(self, rows: list[int]) -> Tails:
        """Return the tails of some rows."""
        return Tails(self.values[:, rows], self.kl[rows], self.calibration[rows])

    def columns(
        self, row: int, values: Array, square: tuple[float, float], overlap: tuple[float, float]
    ) -> dict[str, float]:
        """Compute the columns of a row, by their names (`registry.TAILS`), with standard errors where there are any.

        The error of the root of a mean is that of the mean divided by twice the root.

        Args:
            row: the row.
            values: its values of the sequences that it uses, (sequences, len(SUMS) + 1).
            square: mean of the squared changes of probability, and its standard error.
            overlap: mean of the overlaps, and its standard error.
        """
        largest = float(values[:, -1].max(initial=-math.inf))
        if not math.isfinite(largest):
            largest = math.nan
        change = math.sqrt(square[0])
        return {
            **{name: quantile(self.kl[row], share, largest) for name, share in KL_QUANTILES.items()},
            "kl_nats_max": largest,
            "probability_change_rms": change,
            "probability_change_rms_sem": square[1] / (2 * change) if change else square[1],
            "top5_overlap": overlap[0],
            "top5_overlap_sem": overlap[1],
            "calibration_error": math.nan if math.isnan(largest) else calibration_error(self.calibration[row]),
        }

    def has_shapes(self, sequences: int, rows: int) -> bool:
        """Return whether the arrays have the shapes for so many sequences and rows."""
        meant = Tails.empty(sequences, rows)
        return all(getattr(self, one.name).shape == getattr(meant, one.name).shape for one in fields(self))


def _narrow(kl: Counts) -> Counts:
    """Return counts in the smallest type that holds them: a batch has a few thousand positions."""
    return kl.astype(np.min_scalar_type(kl.max(initial=0)))


def row_tails(metrics: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the tails of a row.

    Args:
        metrics: metrics and `TOKEN_TAILS` of all positions, (len(METRICS) + len(TOKEN_TAILS), positions).
        counts: number of positions of each sequence.

    Returns:
        The values by sequence, (sequences, len(SUMS) + 1), and the counts by bin, as in `Tails`.
    """
    by_name = dict(zip((*METRICS, *TOKEN_TAILS), metrics, strict=True))
    change, overlap, kl = by_name["probability_change"], by_name["top5_overlap"], by_name["kl_nats"]
    of_position = torch.stack([change.square(), overlap, kl])
    values = torch.stack([
        torch.cat([part[:-1].contiguous().sum(-1), part[-1:].amax(-1) if part.shape[1] else part.new_zeros(1)])
        for part in torch.split(of_position, counts, -1)
    ])  # fmt: skip
    one = torch.ones_like(kl, dtype=torch.int64)
    kl_counts = one.new_zeros(len(_EDGES) + 1).scatter_add_(
        0, torch.bucketize(kl, _EDGES.to(kl.device), right=True), one
    )
    confidence = by_name["confidence"].nan_to_num(0)
    # The bins are half open on the left, as in Guo et al. (2017).
    place = ((confidence * CALIBRATION_BINS).ceil().long() - 1).clamp(0, CALIBRATION_BINS - 1)
    correct = by_name["accuracy"].nan_to_num(0).long()
    units = (confidence / _CONFIDENCE_UNIT).round().long()
    sums = one.new_zeros(CALIBRATION_BINS, 3).index_add_(0, place, torch.stack([one, correct, units], -1))
    return values, kl_counts, sums


def quantile(counts: Counts, share: float, largest: float) -> float:
    """Return the smallest value that at least this share of the positions do not exceed, within `KL_ERROR`.

    This is numpy's `quantile(values, share, method="inverted_cdf")`. Values below `KL_LEAST` count as 0, and a quantile
    above `KL_MOST` as the largest value.

    Args:
        counts: number of positions in each bin of KL, (bins,).
        share: between 0 and 1.
        largest: the largest value, which no quantile exceeds; NaN if a value is not a number.
    """
    total = int(counts.sum())
    if not total or math.isnan(largest):
        return math.nan
    wanted = max(1, math.ceil(round(share * total, 6)))  # 0.07 * 100 is 7.000000000000001
    place = int(np.searchsorted(counts.cumsum(), wanted))
    if wanted == total or place == len(_EDGES):
        return largest
    if place == 0:
        return 0.0
    return min(largest, math.sqrt(float(_EDGES[place - 1]) * float(_EDGES[place])))


def calibration_error(counts: Counts) -> float:
    """Return the expected calibration error of counts by bin of confidence, (CALIBRATION_BINS, 3), as in `Tails`.

    It is the mean over positions of the difference, without its sign, between the mean confidence of the position's bin
    and the share of that bin where the most likely token is the true one (Guo et al., On Calibration of Modern Neural
    Networks, 2017).
    """
    total = int(counts[:, 0].sum())
    differences = abs(counts[:, 2] * _CONFIDENCE_UNIT - counts[:, 1])
    return math.fsum(differences.tolist()) / total if total else math.nan
