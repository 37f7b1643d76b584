"""Compute confidence intervals of a mean over positions, from sums and counts by sequence.

The unit is the sequence, since tokens inside one sequence are not independent. There are three kinds:

- `fixed_interval` holds for a number of sequences that was chosen before: Student's t.
- `asymptotic_interval` holds at every number of sequences together, so one may stop as soon as it is narrow enough.
  It is for values without bounds, and approximate for few sequences, as every interval from a standard error is.
- `betting_interval` holds at every number of sequences, too, for values in [0, 1]. It is exact for any number.

>>> import numpy as np
>>> from layersurgery.metrics.intervals import asymptotic_interval, fixed_interval
>>> sums, counts = np.array([3.0, 5, 4, 4, 2, 6, 4, 4]), np.full(8, 10)
>>> ["{:.2f} to {:.2f}".format(*interval(sums, counts)) for interval in (fixed_interval, asymptotic_interval)]
['0.30 to 0.50', '0.22 to 0.58']
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .aggregation import ratio

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
MIN_SEQUENCES = 32
"""Fewest sequences of which a standard error is believed, when a run stops by it.

With fewer, a run would often stop because the first sequences happen to be alike.
"""
_TIGHTEST_AT = 64  # number of sequences at which the asymptotic interval is tightest; 16 and 256 cost 5 % of width
_PRIOR_SPREAD = 0.05  # of a share between sequences, before any is seen; it affects the width, not the validity
_LARGEST_BET = 0.9  # share of the capital that one sequence can lose


def fixed_interval(sums: Array, counts: Array, confidence: float = CONFIDENCE) -> Interval:
    """Compute Student's t interval, which holds for a number of sequences that was chosen before.

    Args:
        sums: sums over the positions of each sequence, (sequences,).
        counts: number of positions of each sequence, the same shape.
        confidence: probability that the interval holds the true mean, between 0 and 1.

    Returns:
        The lower and the upper end; NaN for fewer than two sequences, or sums that are not finite.
    """
    mean, error = ratio(sums, counts)
    half = error * student_errors(len(sums), confidence)
    return mean - half, mean + half


def asymptotic_interval(sums: Array, counts: Array, confidence: float = CONFIDENCE) -> Interval:
    """Compute an asymptotic confidence sequence's interval, which holds at every number of sequences together.

    With n sequences, standard error e and a = 1 - confidence, the interval is
    mean +- e sqrt(2 (n r + 1) / (n r) log(sqrt(n r + 1) / a)) (Waudby-Smith et al., arXiv 2103.06476, equation 10, with
    r their rho squared), where r makes it tightest at 64 sequences. It is widened by Student's t over the normal
    quantile, since the variance of few sequences is itself uncertain.

    Args:
        sums: sums over the positions of each sequence, (sequences,).
        counts: number of positions of each sequence, the same shape.
        confidence: probability that all the intervals hold the true mean, between 0 and 1.

    Returns:
        The lower and the upper end; NaN for fewer than two sequences, or sums that are not finite.
    """
    mean, error = ratio(sums, counts)
    half = error * asymptotic_errors(len(sums), confidence)
    return mean - half, mean + half


def student_errors(n: int, confidence: float) -> float:
    """Return the half width of `fixed_interval` for n sequences, in standard errors; NaN for fewer than two."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + confidence) / 2)) if n > 1 else math.nan


def asymptotic_errors(n: int, confidence: float) -> float:
    """Return the half width of `asymptotic_interval` for n sequences, in standard errors; NaN for fewer than two."""
    from scipy.special import ndtri

    if n < 2:
        return math.nan
    alpha = 1 - confidence
    spread = n * (1 - 2 * math.log(alpha) + math.log(-2 * math.log(alpha))) / _TIGHTEST_AT
    half = math.sqrt(2 * (spread + 1) / spread * math.log(math.sqrt(spread + 1) / alpha))
    return half * student_errors(n, confidence) / float(ndtri((1 + confidence) / 2))


def betting_interval(
    sums: Array,
    counts: Array,
    largest_count: float,
    confidence: float = CONFIDENCE,
    half_width: float | None = None,
) -> Interval:
    """Compute a betting confidence sequence's interval for the mean of values in [0, 1].

    It holds at every number of sequences together, for any number and any distribution (Waudby-Smith and Ramdas, arXiv
    2010.09686, theorem 3). For each candidate mean m, one bets on (sum - m count) / largest_count of every sequence,
    which is zero on average if m is true; m is outside once a bet has won 2 / (1 - confidence) times its stake. The
    size of a bet depends on the sequences before it only, so their order matters.

    Args:
        sums: sums over the positions of each sequence, each between 0 and its count, (sequences,).
        counts: number of positions of each sequence, the same shape.
        largest_count: a number known before the text is seen that no count exceeds.
        confidence: probability that all the intervals hold the true mean, between 0 and 1.
        half_width: half width at which the interval is to be tightest; by default, no width is preferred.

    Returns:
        The lower and the upper end, between 0 and 1; NaN without sequences, or for sums that are not finite.
    """
    total = counts.sum()
    if not total or not np.isfinite(sums).all():
        return math.nan, math.nan
    values, weights = sums / largest_count, counts / largest_count
    bets, needed = _bets(sums / np.maximum(counts, 1), confidence, half_width), math.log(2 / (1 - confidence))
    mean = float(sums.sum() / total)

    def below(candidate: float) -> bool:
        """Return whether the candidate is surely below the mean."""
        stake = np.minimum(bets, _LARGEST_BET / max(candidate, 1e-12))
        return bool(np.log1p(stake * (values - candidate * weights)).sum() >= needed)

    def above(candidate: float) -> bool:
        """Return whether the candidate is surely above the mean."""
        stake = np.minimum(bets, _LARGEST_BET / max(1 - candidate, 1e-12))
        return bool(np.log1p(stake * (candidate * weights - values)).sum() >= needed)

    return _last_true(below, 0.0, mean), _last_true(above, 1.0, mean)


def _bets(shares: Array, confidence: float, half_width: float | None) -> Array:
    """Return how much to bet on each sequence, from the spread of the shares before it."""
    numbers = np.arange(1, len(shares) + 1)
    means = np.cumsum(shares) / numbers
    squares = np.concatenate([[0.0], (shares[1:] - means[:-1]) ** 2])
    variances = (_PRIOR_SPREAD**2 + np.cumsum(squares)) / numbers
    before = np.concatenate([[_PRIOR_SPREAD**2], variances[:-1]])
    if half_width is not None:  # the bet that grows fastest against a mean that is wrong by this much
        return half_width / before
    return np.asarray(np.sqrt(2 * math.log(2 / (1 - confidence)) / (before * numbers * np.log1p(numbers))))


def _last_true(test: Callable[[float], bool], start: float, end: float) -> float:
    """Return the last number from `start` towards `end` that passes a test which only numbers near `start` pass."""
    if not test(start):
        return start
    for _ in range(40):
        middle = (start + end) / 2
        start, end = (middle, end) if test(middle) else (start, middle)
    return start
