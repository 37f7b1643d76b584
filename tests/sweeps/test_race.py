"""Races: who leaves is surely out or surely in, and how often that is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layersurgery.metrics.intervals import asymptotic_interval
from layersurgery.metrics.reference import METRICS
from layersurgery.sweeps.race import Race, surely_lower

KL = METRICS.index("kl_nats")


def table(kl: np.ndarray) -> np.ndarray:
    """Return sums of ten positions of each sequence, with row 0 for the unedited model."""
    values = np.zeros((len(kl), kl.shape[1] + 1, len(METRICS)))
    values[:, 1:, KL] = 10 * kl
    return values


def run(race: Race, kl: np.ndarray, step: int = 4) -> dict[int, int]:
    """Race over the sequences; return after how many each row left."""
    values = table(kl)
    left: dict[int, int] = {}
    for n in range(step, len(kl) + 1, step):
        rows = [row for row in range(1, values.shape[1]) if row not in left]
        left |= dict.fromkeys(race.finished(values[:n], np.full(n, 10.0), rows), n)
        values[n:, list(left)] = np.nan
    return left


def test_a_comparison_is_that_of_the_interval_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, 24).astype(float)
    sums = counts[:, None] * (rng.normal(0, 1, (24, 1)) + rng.normal([0, 0.1, 0.3, 0.31], 0.1, (24, 4)))
    found = surely_lower(sums, counts, 0.99)
    for one in range(4):
        for other in range(4):
            _, high = asymptotic_interval(sums[:, one] - sums[:, other], counts, 0.99)
            assert found[one, other] == (high < 0)
    assert found[0, 2]
    assert not found[2, 3]


def test_what_sequences_share_does_not_hide_a_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.lognormal(0, 1, (64, 1))
    kl = hard * (np.array([1, 1.3, 1.6, 1.9]) + rng.normal(0, 0.05, (64, 4)))
    race = Race(2)
    assert set(run(race, kl)) == {1, 2, 3, 4}
    assert race.winners == {1, 2}
    assert race.losers == {3, 4}


def test_rows_that_are_alike_stay_until_the_end() -> None:
    kl = np.random.default_rng(0).normal([1, 1, 5], 0.3, (40, 3))
    race = Race(1)
    assert set(run(race, kl)) == {3}
    assert [race.outcome(row) for row in (1, 2, 3)] == ["open", "open", "higher"]


def test_rows_that_are_not_finite_lose() -> None:
    kl = np.random.default_rng(0).normal([1, 2, 3], 0.01, (16, 3))
    kl[3, 0] = math.inf
    race = Race(1)
    assert set(run(race, kl)) == {1, 2, 3}
    assert race.winners == {2}


@pytest.mark.slow
def test_a_race_is_wrong_at_most_as_often_as_it_says() -> None:
    wrong = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        means = np.sort(rng.lognormal(0, 0.5, 12))
        hard = rng.lognormal(0, 0.5, (96, 1))
        race = Race(4)
        run(race, hard * means * rng.lognormal(0, 0.3, (96, 12)))
        wrong += bool(race.winners - {1, 2, 3, 4} or race.losers & {1, 2, 3, 4})
    assert wrong / 300 <= 0.05
