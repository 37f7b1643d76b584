"""Sums by sequence: the same digits however the data is split, and errors that mean what they say."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layersurgery.metrics.aggregation import BatchResult, SequenceSums
from layersurgery.metrics.reference import METRICS

M = len(METRICS)
_numbers = st.floats(-1e6, 1e6).map(lambda x: x + 0.1)
_sequences = st.lists(
    st.tuples(st.integers(0, 50), st.lists(_numbers, min_size=2 * M, max_size=2 * M)), min_size=1, max_size=12
).filter(lambda drawn: any(count for count, _ in drawn))
Sequences = list[tuple[int, list[float]]]


def result(first: int, sequences: Sequences) -> BatchResult:
    values = np.array([values for _, values in sequences]).reshape(len(sequences), -1, M)
    return BatchResult(first, [count for count, _ in sequences], values, np.zeros((len(sequences), 0)))


def summed(sequences: Sequences) -> SequenceSums:
    return SequenceSums.of([result(0, sequences)])


@given(_sequences, st.randoms(use_true_random=False))
def test_any_split_in_any_order_gives_the_same_digits(drawn: Sequences, rng: random.Random) -> None:
    whole = summed(drawn)
    cuts = sorted({0, len(drawn), *rng.choices(range(len(drawn) + 1), k=3)})
    batches = [result(start, drawn[start:stop]) for start, stop in itertools.pairwise(cuts)]
    split = SequenceSums.of(rng.sample(batches, len(batches)))
    assert split.numbers == whole.numbers == [number for number, (count, _) in enumerate(drawn) if count]
    assert len(whole) == len(whole.numbers)
    for found, meant in zip(split.means_and_errors(), whole.means_and_errors(), strict=True):
        assert found.tobytes() == meant.tobytes()
    assert split.tokens == whole.tokens == sum(count for count, _ in drawn)
    assert split.rows([1]).means_and_errors()[0].tobytes() == whole.means_and_errors()[0][1:].tobytes()


def test_parts_of_a_batch_are_joined() -> None:
    first = BatchResult(
        4, [2], np.zeros((1, 2, M)), np.zeros((1, 3)), 1.5, 7, 3, 10, None, {(0,): torch.zeros(M, 2)}
    )  # fmt: skip
    empty = BatchResult(0, [0], np.zeros((1, 2, M)), np.zeros((1, 3)))
    last = BatchResult(0, [3], np.ones((1, 2, M)), np.ones((1, 3)), 2.0, 5, 4, 1, 1, {(0,): torch.ones(M, 3)})
    joined = BatchResult.concatenate([first, empty, last])
    assert (joined.first, joined.counts, joined.seconds, joined.calls) == (4, [2, 0, 3], 3.5, 12)
    assert (joined.states_at_peak, joined.bytes_read, joined.max_sequences) == (4, 11, 1)
    assert joined.values[:, 0, 0].tolist() == joined.observed[:, 0].tolist() == [0, 0, 1]
    assert joined.token_metrics is not None
    assert joined.token_metrics[0,][0].tolist() == [0, 0, 1, 1, 1]
    assert BatchResult.concatenate([empty]).token_metrics is None


def test_errors_of_sequences_of_one_length_are_those_of_their_means() -> None:
    rng = random.Random(1)
    values = [[rng.gauss(0, 1) for _ in range(2 * M)] for _ in range(9)]
    means, errors = summed([(20, row) for row in values]).means_and_errors()
    column = [row[0] / 20 for row in values]
    assert means[0, 0] == pytest.approx(statistics.fmean(column))
    assert errors[0, 0] == pytest.approx(statistics.stdev(column) / 3)


def test_errors_of_sequences_of_any_length_cover_the_mean() -> None:
    """Over many draws, the mean lies within one error of the truth about two times in three."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        drawn = []
        for _ in range(40):
            count = int(rng.integers(5, 60))
            level = rng.normal(3, 1)  # tokens of one sequence share something
            drawn.append((count, [(level + rng.normal(0, 1, count)).sum()] * M))
        means, errors = summed(drawn).means_and_errors()
        inside += abs(means[0, 0] - 3) < errors[0, 0]
    assert 0.60 < inside / 400 < 0.74


def test_what_is_no_number_stays_none() -> None:
    values = [1.0] * 2 * M
    for bad in (math.nan, math.inf, -math.inf):
        means, errors = summed([(3, values), (3, [bad, *values[1:]])]).means_and_errors()
        assert math.isnan(means[0, 0])
        assert math.isnan(errors[0, 0])
        assert means[0, 1] == pytest.approx(1 / 3)


def test_one_sequence_has_no_error_and_none_counts_twice() -> None:
    means, errors = summed([(3, [1.0] * 2 * M)]).means_and_errors()
    assert np.isnan(errors).all()
    assert means[0, 0] == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="counted twice"):
        SequenceSums.of([result(0, [(3, [1.0] * M)] * 2), result(1, [(3, [1.0] * M)])])
    nothing = summed([(0, [1.0] * M)])
    assert (len(nothing), nothing.tokens) == (0, 0)
    assert all(np.isnan(array).all() for array in nothing.means_and_errors())
