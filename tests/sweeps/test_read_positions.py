"""Predictions that are read at some positions only: the same for all edits, and right on average."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import layersurgery as ls
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.read_positions import ReadPositions
from tests.support.zoo import DEPTH, tiny_model, tokens


@pytest.mark.parametrize(
    ("read", "share"), [("1/4", Fraction(1, 4)), (0.5, Fraction(1, 2)), ("0.1", Fraction(1, 10)), (64, 64), ("7", 7)]
)
def test_it_is_a_share_or_a_number(read: str | float, share: Fraction | int) -> None:
    assert ReadPositions.parse(read).share == share


def test_a_choice_depends_on_the_seed_and_the_sequence_alone() -> None:
    may = torch.ones(6, 20, dtype=torch.bool)
    may[3, 5:] = False
    chosen = ReadPositions(Fraction(1, 4), 3).choose(may, first=10)
    assert chosen.sum(-1).tolist() == [5, 5, 5, 2, 5, 5]
    assert not (chosen & ~may).any()
    assert torch.equal(ReadPositions(Fraction(1, 4), 3).choose(may[2:], first=12), chosen[2:])
    assert not torch.equal(ReadPositions(Fraction(1, 4), 4).choose(may, first=10), chosen)
    assert ReadPositions(8, 0).choose(may, first=0).sum(-1).tolist() == [8, 8, 8, 5, 8, 8]


def test_reading_everything_is_reading_all() -> None:
    ids = tokens(3, 9)
    whole = ls.sweep(tiny_model("llama"), "drop", ids)
    assert ls.sweep(tiny_model("llama"), "drop", ids, read=100).kl_nats.tolist() == whole.kl_nats.tolist()


def test_the_sums_are_those_of_the_chosen_positions() -> None:
    model, edits, ids = tiny_model("llama"), variants("drop", DEPTH), tokens(3, 17)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    single = Measurer(model, edits).measure(ids, mask, per_token=True)
    assert single.token_metrics is not None
    quarter = ReadPositions(Fraction(1, 4), 7)
    found = Measurer(model, edits, read=quarter).measure(ids, mask, first=5)
    positions = torch.ones(3, 16, dtype=torch.bool)
    positions[1, 9:] = False
    chosen = quarter.choose(positions, 5)
    assert found.counts == single.counts == [16, 9, 16]
    for rows, metrics in single.token_metrics.items():
        for number, values in enumerate(torch.split(metrics, single.counts, -1)):
            of_chosen = values[:, chosen[number, : single.counts[number]]]
            expected = of_chosen.double().mean(-1) * single.counts[number]
            np.testing.assert_allclose(found.values[number, rows[0]], expected.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_estimates_are_right_on_average_and_their_errors_too() -> None:
    model, edits, ids = tiny_model("llama"), variants("swap,drop", DEPTH), tokens(16, 33)
    mask = torch.ones_like(ids)
    whole = Measurer(model, edits).measure(ids, mask).values.sum(0) / 512
    means = []
    for seed in range(200):
        read = Measurer(model, edits, read=ReadPositions(Fraction(1, 4), seed))
        means.append(read.measure(ids, mask).values.sum(0) / 512)
    found = np.array(means)
    error = found.std(0, ddof=1) / np.sqrt(200)
    off = np.abs(found.mean(0) - whole)[1:] / np.maximum(error[1:], 1e-12)
    assert off.max() < 4.5  # of 56 numbers, each a normal deviate
    assert np.sqrt((off**2).mean()) < 1.5
    frame = ls.sweep(model, "swap,drop", ids, read="1/4")
    kl = METRICS.index("kl_nats")
    whole_error = ls.sweep(model, "swap,drop", ids).kl_nats_sem
    spread = np.sqrt(whole_error[1:] ** 2 + found.std(0, ddof=1)[1:, kl] ** 2)  # between sequences, and of the choice
    assert 0.6 < (frame.kl_nats_sem[1:] / spread).median() < 1.5
