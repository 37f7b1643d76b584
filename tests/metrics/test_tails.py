"""Quantiles, overlaps and calibration from sums and counts: what numpy finds in all values, however they are split."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layersurgery import registry
from layersurgery.metrics import dispatch, reference, tiled
from layersurgery.metrics.aggregation import BatchResult, SequenceSums
from layersurgery.metrics.reference import METRICS, TOKEN_TAILS
from layersurgery.metrics.tails import KL_ERROR, KL_LEAST, Tails, row_tails
from layersurgery.registry import KL_QUANTILES
from tests.metrics.test_tiled import Plain, drawn

KL, ACCURACY = METRICS.index("kl_nats"), METRICS.index("accuracy")
CHANGE, OVERLAP, CONFIDENCE = (len(METRICS) + TOKEN_TAILS.index(name) for name in TOKEN_TAILS)
ROWS = 3


def positions(count: int, seed: int) -> torch.Tensor:
    """Draw what `dispatch.measure` returns with tails for so many positions; KL spans all magnitudes."""
    rng = np.random.default_rng(seed)
    metrics = rng.normal(size=(len(METRICS) + len(TOKEN_TAILS), count))
    metrics[KL] = np.exp(rng.normal(-3, 5, count)).clip(max=1000) * (rng.random(count) > 0.1)
    metrics[ACCURACY] = rng.random(count) < 0.3
    metrics[CHANGE] = rng.uniform(-1, 1, count)
    metrics[OVERLAP] = rng.integers(0, 6, count) / 5
    metrics[CONFIDENCE] = rng.beta(0.5, 0.5, count)
    return torch.from_numpy(metrics)


def result(first: int, counts: list[int], rows: list[torch.Tensor], measured: tuple[int, ...] | None) -> BatchResult:
    """Make a batch's result of these positions of each row."""
    chosen = range(len(rows)) if measured is None else measured
    tails = Tails.stack({row: row_tails(rows[row], counts) for row in chosen}, len(counts), len(rows))
    values = np.zeros((len(counts), len(rows), len(METRICS)))
    return BatchResult(first, counts, values, np.zeros((len(counts), 0)), rows=measured, tails=tails)


def columns(sums: SequenceSums) -> list[dict[str, float]]:
    return [sums.tail_columns(row) for row in range(ROWS)]


def expected(metrics: torch.Tensor) -> dict[str, float]:
    """Compute the columns from all positions."""
    kl, confidence, correct = (metrics[index].numpy() for index in (KL, CONFIDENCE, ACCURACY))
    found = {name: np.quantile(kl, share, method="inverted_cdf") for name, share in KL_QUANTILES.items()}
    error = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return {
        **found,
        "kl_nats_max": kl.max(),
        "probability_change_rms": math.sqrt((metrics[CHANGE] ** 2).mean()),
        "top5_overlap": float(metrics[OVERLAP].mean()),
        "calibration_error": error,
    }


@pytest.mark.parametrize("count", [1, 2, 99, 1000, 30_000])
def test_the_columns_are_those_of_all_values(count: int) -> None:
    metrics = positions(count, seed=count)
    half = count // 2
    found = SequenceSums.of([result(0, [half, 0, count - half], [metrics], None)]).tail_columns(0)
    meant = expected(metrics)
    assert {name for name in found if not name.endswith("_sem")} == meant.keys() == {one.name for one in registry.TAILS}
    for name, value in meant.items():
        if name in KL_QUANTILES:
            assert found[name] == pytest.approx(value, rel=KL_ERROR * (1 + 1e-9), abs=KL_LEAST), name
        else:
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert found["kl_nats_max"] == meant["kl_nats_max"]


def test_quantiles_are_as_precise_as_they_say_and_no_more() -> None:
    """The stated error is reached: at the edge of a bin."""
    worst = 0.0
    for value in 2.0 ** np.linspace(-23, 9.9, 500):
        metrics = positions(3, 0)
        metrics[KL] = torch.tensor([value, value, 2 * value])
        found = SequenceSums.of([result(0, [3], [metrics], None)]).tail_columns(0)["kl_nats_median"]
        worst = max(worst, abs(found / value - 1))
    assert 0.9 * KL_ERROR < worst <= KL_ERROR * (1 + 1e-9)


def test_the_error_of_a_root_covers_it() -> None:
    """Over many draws, the RMS lies within one error of the truth about two times in three."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        metrics = positions(40 * 9, 0)
        level = np.repeat(rng.normal(0, 1, 40), 9)  # tokens of one sequence share something
        metrics[CHANGE] = torch.from_numpy(level * rng.normal(0, 1, 40 * 9))
        found = SequenceSums.of([result(0, [9] * 40, [metrics], None)]).tail_columns(0)
        inside += abs(found["probability_change_rms"] - 1) < found["probability_change_rms_sem"]
    assert 0.55 < inside / 300 < 0.75


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=9), rng=st.randoms(use_true_random=False))
def test_any_split_gives_the_same_digits(counts: list[int], rng: random.Random) -> None:
    rows = [positions(sum(counts), seed) for seed in range(ROWS)]
    whole = SequenceSums.of([result(0, counts, rows, None)])
    cuts = sorted({0, len(counts), *rng.choices(range(len(counts) + 1), k=3)})
    starts = [0, *itertools.accumulate(counts)]
    batches = [
        result(first, counts[first:last], [row[:, starts[first] : starts[last]] for row in rows], None)
        for first, last in itertools.pairwise(cuts)
    ]
    split = SequenceSums.of(rng.sample(batches, len(batches)))
    for found, meant in zip(columns(split), columns(whole), strict=True):
        assert np.array([*found.values()]).tobytes() == np.array([*meant.values()]).tobytes()
    joined = SequenceSums.of([BatchResult.concatenate(batches)]).rows([2])
    assert joined.tail_columns(0) == pytest.approx(columns(whole)[2], rel=0, abs=0, nan_ok=True)


def test_a_row_counts_the_batches_that_it_uses_and_rows_of_a_batch_may_come_later() -> None:
    rows = [[positions(20, 10 * batch + row) for row in range(ROWS)] for batch in range(3)]
    whole = [result(2 * batch, [12, 8], rows[batch], None) for batch in range(3)]
    later = [
        result(2 * batch, [12, 8], rows[batch], (0, 1)).merge(result(2 * batch, [12, 8], rows[batch], (0, 2)))
        for batch in range(3)
    ]
    used = [np.array([True, batch < 1, batch < 2]) for batch in range(3)]
    found, sums = (columns(SequenceSums.of(results, used)) for results in (later, whole))
    assert found == sums
    for row, batches in ((0, 3), (1, 1), (2, 2)):
        assert found[row] == SequenceSums.of(whole[:batches]).tail_columns(row)
    lacking = SequenceSums.of([result(0, [12, 8], rows[0], (0, 2))]).tail_columns(1)
    assert all(map(math.isnan, lacking.values()))
    assert (
        SequenceSums.of([BatchResult(0, [1], np.zeros((1, 1, len(METRICS))), np.zeros((1, 0)))]).tail_columns(0) == {}
    )


@pytest.mark.parametrize("bad", [CHANGE, KL])
def test_what_is_no_number_stays_none(bad: int) -> None:
    metrics = positions(9, 0)
    metrics[:, 4] = math.nan
    found = SequenceSums.of([result(0, [5, 4], [metrics], None)]).tail_columns(0)
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize("vocabulary", [2, 7, 64, 200, 1000])
@pytest.mark.parametrize("tile", [300, 10_000])
@pytest.mark.parametrize("levels", [3, 40])
def test_equal_logits_overlap_as_the_definition_says(
    vocabulary: int, tile: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a few levels, so that most are equal; the definition itself is checked with sorted lists."""
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", tile)
    rng = torch.Generator().manual_seed(vocabulary)
    readout = Plain(torch.randint(0, levels, (vocabulary, 2), generator=rng).float())
    p, q = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    target = torch.zeros(3, dtype=torch.long)
    base = dispatch.baseline(readout, p, target, tails=True)
    found = dispatch.measure(readout, q, base)[OVERLAP]
    p_logits, q_logits = (readout.logits_tile(x, 0, vocabulary) for x in (p, q))
    assert torch.equal(found, reference.measure_tails(p_logits, q_logits, target)[1])
    for row, (one, other) in enumerate(zip(p_logits.tolist(), q_logits.tolist(), strict=True)):
        top = sorted(range(vocabulary), key=lambda token: (-one[token], token))[:5]
        assert base.top_TK is not None
        assert base.top_TK[row].tolist() == top
        among = [sum(logit > other[token] for logit in other) < len(top) for token in top]
        assert float(found[row]) == pytest.approx(sum(among) / len(top))
    assert found[2] == 1


def test_the_same_model_has_no_tails() -> None:
    for readout in (Plain(drawn(301, 8)), Plain(drawn(301, 8), cap=3.0), Plain(drawn(301, 8), tokens_at_once=7)):
        x = drawn(50, 8, seed=1)
        base = dispatch.baseline(readout, x, torch.arange(50), tails=True)
        found = dispatch.measure(readout, x.clone(), base)
        assert found[[KL, CHANGE]].eq(0).all()
        assert found[OVERLAP].eq(1).all()
        assert torch.equal(found, dispatch.measure_unedited(base))
