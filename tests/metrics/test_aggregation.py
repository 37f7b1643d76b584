"""Sums by sequence: the same digits however the data is split, and errors that mean what they say."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layersurgery.metrics.aggregation import MetricSums
from layersurgery.metrics.reference import METRICS

M = len(METRICS)
_numbers = st.floats(-1e6, 1e6).map(lambda x: x + 0.1)
_sequences = st.lists(
    st.tuples(st.integers(1, 50), st.lists(_numbers, min_size=2 * M, max_size=2 * M)), min_size=1, max_size=12
)


def summed(sequences: list[tuple[int, int, list[float]]]) -> MetricSums:
    sums = MetricSums(2)
    for number, count, values in sequences:
        sums.add(number, count, np.array(values).reshape(2, M))
    return sums


@given(_sequences, st.randoms(use_true_random=False))
def test_merging_any_split_in_any_order_gives_the_same_digits(
    drawn: list[tuple[int, list[float]]], rng: random.Random
) -> None:
    numbered = [(number, count, values) for number, (count, values) in enumerate(drawn)]
    whole = summed(numbered)
    shuffled = rng.sample(numbered, len(numbered))
    cuts = sorted(rng.choices(range(len(numbered) + 1), k=3))
    merged = MetricSums(2)
    for start, stop in zip([0, *cuts], [*cuts, len(numbered)], strict=True):
        merged = summed(shuffled[start:stop]).merge(merged)
    assert merged.means().tobytes() == whole.means().tobytes()
    assert merged.errors().tobytes() == whole.errors().tobytes()
    assert merged.tokens == whole.tokens


def test_errors_of_sequences_of_one_length_are_those_of_their_means() -> None:
    rng = random.Random(1)
    values = [[rng.gauss(0, 1) for _ in range(2 * M)] for _ in range(9)]
    sums = summed([(number, 20, row) for number, row in enumerate(values)])
    column = [row[0] / 20 for row in values]
    assert sums.means()[0, 0] == pytest.approx(statistics.fmean(column))
    assert sums.errors()[0, 0] == pytest.approx(statistics.stdev(column) / 3)


def test_errors_of_sequences_of_any_length_cover_the_mean() -> None:
    """Over many draws, the mean lies within one error of the truth about two times in three."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        sums = MetricSums(1)
        for number in range(40):
            count = int(rng.integers(5, 60))
            level = rng.normal(3, 1)  # tokens of one sequence share something
            sums.add(number, count, np.full((1, M), (level + rng.normal(0, 1, count)).sum()))
        inside += abs(sums.means()[0, 0] - 3) < sums.errors()[0, 0]
    assert 0.60 < inside / 400 < 0.74


def test_what_is_no_number_stays_none() -> None:
    values = [1.0] * 2 * M
    for bad in (math.nan, math.inf, -math.inf):
        sums = summed([(0, 3, values), (1, 3, [bad, *values[1:]])])
        assert math.isnan(sums.means()[0, 0])
        assert math.isnan(sums.errors()[0, 0])
        assert sums.means()[0, 1] == pytest.approx(1 / 3)


def test_one_sequence_has_no_error_and_none_counts_twice() -> None:
    sums = summed([(0, 3, [1.0] * 2 * M)])
    assert np.isnan(sums.errors()).all()
    with pytest.raises(AssertionError, match="counted twice"):
        sums.merge(sums)
