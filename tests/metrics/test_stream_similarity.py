"""HSIC and cosines of all pairs of states equal their definitions, and have the properties that these promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layersurgery.metrics import stream_similarity
from layersurgery.metrics.aggregation import ratio
from layersurgery.metrics.stream_similarity import cka, cosine_sums, unbiased_hsic


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compute equation 3 of arXiv 2010.15327 as it is written."""
    n = len(x)
    k, m = (value.double() @ value.double().T for value in (x, y))
    for matrix in (k, m):
        matrix.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return float((torch.trace(k @ m) + sums) / (n * (n - 3)))


def cka_of(states: list[torch.Tensor]) -> np.ndarray:
    hsic = unbiased_hsic(states)[0].numpy()
    return np.array(
        [
            [cka(hsic[None, one, two], hsic[None, one, one], hsic[None, two, two])[0] for two in range(len(states))]
            for one in range(len(states))
        ]
    )


@pytest.mark.parametrize("tokens", [4, 5, 23])
@pytest.mark.parametrize("mean_free", [False, True])
def test_hsic_and_cosines_are_their_definitions(tokens: int, mean_free: bool) -> None:
    states = [numbers(tokens, 7, seed=seed) + seed for seed in range(3)]
    states.append(states[0] + 0.3 * states[1])
    read = [x - x.mean(-1, keepdim=True) if mean_free else x for x in map(torch.Tensor.double, states)]
    hsic, cosines = (measure(states, mean_free=mean_free).numpy() for measure in (unbiased_hsic, cosine_sums))
    for one, x in enumerate(read):
        for two, y in enumerate(read):
            assert hsic[0, one, two] == pytest.approx(dense_hsic(x, y), rel=1e-9, abs=1e-12)
            without_first = dense_hsic(x[1:], y[1:]) if tokens > 4 else 0
            assert hsic[1, one, two] == pytest.approx(without_first, rel=1e-9, abs=1e-12)
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).sum()
            assert cosines[one, two] == pytest.approx(float(cosine), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_rounded_again(dtype: torch.dtype) -> None:
    states = [numbers(9, 6, seed=seed).to(dtype) for seed in range(2)]
    for measure in (unbiased_hsic, cosine_sums):
        assert torch.equal(measure(states), measure([state.double() for state in states]))


def test_slabs_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [numbers(11, 5, seed=seed) for seed in range(3)]
    at_once = unbiased_hsic(states), cosine_sums(states)
    for elements in (1, 3 * 11 * 4, 3 * 5 * 4):  # one row, four rows of HSIC, four tokens of cosines
        monkeypatch.setattr(stream_similarity, "_SLAB_ELEMENTS", elements)
        for found, meant in zip((unbiased_hsic(states), cosine_sums(states)), at_once, strict=True):
            torch.testing.assert_close(found, meant, rtol=1e-12, atol=1e-12)


def test_cka_sees_neither_rotation_nor_scale_nor_shift() -> None:
    x = numbers(20, 6)
    rotation = torch.linalg.qr(numbers(6, 6, seed=1)).Q
    others = [x @ rotation, -3 * x, x + numbers(6, seed=2), torch.cat([x, torch.zeros(20, 1)], 1) @ numbers(7, 7)]
    np.testing.assert_allclose(cka_of([x, *others[:3]]), 1, atol=1e-5)
    assert cka_of([x, others[3]])[0, 1] < 0.95


def test_a_token_far_from_all_others_leaves_the_digits() -> None:
    """The first token's stream may be a thousand times as long as the others', also in a short sequence."""
    x, y = numbers(5, 64), numbers(5, 64, seed=1)
    x[0, 3], y[0, 3] = 1e4, 2e4
    found = unbiased_hsic([x, y])[:, 0, 1].tolist()
    assert found == pytest.approx([dense_hsic(x, y), dense_hsic(x[1:], y[1:])], rel=1e-6)


def test_the_estimate_is_unbiased() -> None:
    """HSIC of independent states is zero on average, however few tokens there are."""
    draws, tokens = 1500, 5
    random = torch.Generator().manual_seed(5)
    found = [
        float(unbiased_hsic([torch.randn((tokens, 3), generator=random) for _ in range(2)])[0, 0, 1])
        for _ in range(draws)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(draws)


def test_the_error_is_that_of_a_ratio_of_means() -> None:
    random = np.random.default_rng(0)
    first, second = random.gamma(9, size=(2, 400))
    between = 0.5 * np.sqrt(first * second) + 0.1 * random.normal(size=400)
    value, error = cka(between, first, second)
    assert value == pytest.approx(between.mean() / np.sqrt(first.mean() * second.mean()))
    without = [cka(*(np.delete(values, left) for values in (between, first, second)))[0] for left in range(400)]
    jackknife = np.sqrt(399 / 400 * np.square(np.array(without) - np.mean(without)).sum())
    assert error == pytest.approx(jackknife, rel=0.01)
    assert cka(between, first, first) == pytest.approx(ratio(between, first))
    assert cka(first, first, first) == (1, 0)


def test_what_has_no_value() -> None:
    nothing = np.zeros(0)
    assert np.isnan(cka(nothing, nothing, nothing)).all()
    assert np.isnan(cka(np.zeros(2), np.zeros(2), np.ones(2))).all()
    one = np.ones(1)
    assert cka(one, one, one)[0] == 1
    assert np.isnan(cka(one, one, one)[1])
    broken = np.array([1.0, np.nan])
    assert np.isnan(cka(broken, np.ones(2), np.ones(2))).all()
    x = torch.zeros(4, 3)
    assert cosine_sums([x, x + 1]).tolist() == [[0, 0], [0, pytest.approx(4)]]
