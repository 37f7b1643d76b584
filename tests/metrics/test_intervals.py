"""Confidence intervals: they hold the true mean as often as they say, also where one stops by them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from layersurgery.metrics.aggregation import ratio
from layersurgery.metrics.intervals import (
    MIN_SEQUENCES,
    Interval,
    asymptotic_interval,
    betting_interval,
    fixed_interval,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]
Method = Callable[[np.ndarray, np.ndarray], Interval]

POSITIONS = 100.0


def test_the_fixed_interval_is_students() -> None:
    shares = np.random.default_rng(0).gamma(2, 1, 12)
    low, high = fixed_interval(POSITIONS * shares, np.full(12, POSITIONS), 0.9)
    meant = stats.t.interval(0.9, 11, loc=shares.mean(), scale=stats.sem(shares))
    assert (low, high) == pytest.approx(meant, rel=1e-12)


def test_the_asymptotic_interval_is_that_of_its_paper() -> None:
    shares, n, alpha = np.random.default_rng(0).gamma(2, 1, 40), 40, 0.05
    rho_squared = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / 64
    scaled = n * rho_squared
    boundary = math.sqrt(2 * (scaled + 1) / (n * scaled) * math.log(math.sqrt(scaled + 1) / alpha))
    half = shares.std(ddof=1) * boundary * stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975)
    low, high = asymptotic_interval(POSITIONS * shares, np.full(n, POSITIONS))
    assert (low, high) == pytest.approx((shares.mean() - half, shares.mean() + half), rel=1e-12)


def capital(shares: np.ndarray, mean: float, half_width: float, side: int) -> float:
    """Return what betting that the mean is higher (side 1) or lower (side -1) has made of 1, one bet after another."""
    money, squares = 1.0, 0.05**2
    seen: list[float] = []
    for share in shares:
        variance = squares / max(1, len(seen))
        limit = mean if side > 0 else 1 - mean
        money *= 1 + min(half_width / variance, 0.9 / limit) * side * (share - mean)
        if seen:
            squares += (share - np.mean(seen)) ** 2
        seen.append(share)
    return money


def test_the_betting_interval_ends_where_a_bet_wins_forty_times_its_stake() -> None:
    shares = np.random.default_rng(0).beta(60, 40, 150)
    low, high = betting_interval(POSITIONS * shares, np.full(150, POSITIONS), 100, half_width=0.02)
    assert 0 < low < shares.mean() < high < 1
    assert capital(shares, low, 0.02, 1) == pytest.approx(40, rel=1e-6)
    assert capital(shares, high, 0.02, -1) == pytest.approx(40, rel=1e-6)


@pytest.mark.parametrize("method", [fixed_interval, asymptotic_interval])
def test_unequal_lengths_have_the_error_of_a_ratio(method: Method) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 100, 30).astype(float)
    sums = counts * rng.gamma(2, 1, 30)
    mean, error = ratio(sums, counts)
    low, high = method(sums, counts)
    assert (low + high) / 2 == pytest.approx(mean)
    assert 1.9 < (high - low) / 2 / error < 4


def test_what_cannot_be_said_is_nan_and_what_does_not_vary_is_known() -> None:
    one, none = (np.array([3.0]), np.array([5.0])), (np.array([]), np.array([]))
    for method in (fixed_interval, asymptotic_interval):
        for sums, counts in (one, none, (np.array([1, math.inf, 2]), np.full(3, 5.0))):
            assert np.isnan(method(sums, counts)).all()
        assert method(np.full(9, 2.5), np.full(9, 5.0)) == (0.5, 0.5)
    assert np.isnan(betting_interval(*none, 5)).all()
    assert np.allclose(betting_interval(*one, 5), (0, 1), atol=0.01)
    low, high = betting_interval(np.full(9, 5.0), np.full(9, 5.0), 5)  # all alike so far says little of the rest
    assert low < 0.9
    assert high == 1


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(1, 0.3, n)


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(-0.5, 1, n)


def share(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.beta(32, 8, n)


def stopped(
    method: Method, draw: Draw, truth: float, half: float, repetitions: int, most: int = 800, *, relative: bool = False
) -> float:
    """Return how often the true mean lies in the interval at the first look at which it is narrow enough."""
    held = 0
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        shares = draw(rng, most)
        for n in range(MIN_SEQUENCES, most + 1, 4):
            low, high = method(POSITIONS * shares[:n], np.full(n, POSITIONS))
            if (high - low) / 2 <= half * ((high + low) / 2 if relative else 1):
                break
        held += low <= truth <= high
    return held / repetitions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "draw", "truth", "half"),
    [
        (asymptotic_interval, normal, 1.0, 0.1),
        (lambda sums, counts: betting_interval(sums, counts, 100, half_width=0.03), share, 0.8, 0.03),
        (lambda sums, counts: betting_interval(sums, counts, 100), share, 0.8, 0.03),
    ],
    ids=["asymptotic", "betting", "betting without an aim"],
)
def test_an_interval_for_every_stopping_time_holds_where_one_stops(
    method: Method, draw: Draw, truth: float, half: float
) -> None:
    assert stopped(method, draw, truth, half, 300) >= 0.97


@pytest.mark.slow
def test_so_it_does_with_a_heavy_tail_and_one_for_a_fixed_number_does_not() -> None:
    assert stopped(asymptotic_interval, heavy, 1.0, 0.25, 300, relative=True) >= 0.95
    assert stopped(fixed_interval, heavy, 1.0, 0.25, 300) < 0.93
