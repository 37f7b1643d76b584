"""Test what is said of a sweep's maps, word by word, on tables made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from scipy.stats import t as student

import layersurgery as ls
from layersurgery.metrics.intervals import asymptotic_errors
from layersurgery.sweeps.map_sentences import describe_maps, drop_sentence, pair_sentence, repeat_sentences
from layersurgery.sweeps.results import FIXED, STOPPING
from tests.support.zoo import tiny_model, tokens


def cells(*rows: tuple[str, str, int, int, float, float], sem: float = 0.001, **columns: Any) -> pd.DataFrame:
    """A table of edits: family, plan, from, to, KL, change in loss; intervals of KL are 0.01 to each side."""
    frame = pd.DataFrame([*rows], columns=["edit", "plan", "from", "to", "kl_nats", "loss_change_nats"])
    frame["kl_nats_low"], frame["kl_nats_high"] = frame.kl_nats - 0.01, frame.kl_nats + 0.01
    frame = frame.assign(loss_change_nats_sem=sem, sequences=16, interval=f"95 %, {FIXED}", **columns)
    base = pd.DataFrame([{"edit": "none", "plan": "", "kl_nats": 0.0, "loss_change_nats": 0.0}])
    return pd.concat([base, frame], ignore_index=True).astype({"from": "Int64", "to": "Int64"})


def spans(*costs: float, family: str = "drop-spans") -> pd.DataFrame:
    """Drops of the spans 0:1, 0:2, ... with these KLs, and of 1:2, which costs 2 nats."""
    rows = [(family, f"drop 0:{stop}", 0, stop, cost, cost) for stop, cost in enumerate(costs, 1)]
    return cells(*rows, (family, "drop 1", 1, 2, 2.0, 2.0))


def repeats(*changes: float, **options: Any) -> pd.DataFrame:
    """Repeats of 0, 0:2, 0:3, ... with these changes in loss, and twice their sizes as KL."""
    rows = [
        ("repeat-spans", f"repeat 0:{stop}", stop, 0, 2 * abs(change), change) for stop, change in enumerate(changes, 1)
    ]
    return cells(*rows, **options)


def test_spans_that_are_nearly_free() -> None:
    assert drop_sentence(spans(0.02, 0.05, 0.5)) == (
        "dropping layers 0:1 costs 0.020 nats of KL (0.010 to 0.030), the least of 2 spans of one layer; "
        "dropping layers 0:2 costs 0.050 nats of KL (0.040 to 0.060), the only span of two layers; "
        "no span that is longer costs less than 0.1 nats"
    )
    # Of many lengths, one layer, two and the longest.
    assert drop_sentence(spans(0.02, 0.05, 0.06, 0.07, 0.08, family="jump")) == (
        "dropping layers 0:1 costs 0.020 nats of KL (0.010 to 0.030), the least of 2 spans of one layer; "
        "dropping layers 0:2 costs 0.050 nats of KL (0.040 to 0.060), the only span of two layers; "
        "dropping layers 0:5 costs 0.080 nats of KL (0.070 to 0.090), the only span of 5 layers"
    )


def test_no_span_is_nearly_free() -> None:
    assert drop_sentence(spans(0.3, 0.12, np.nan)) == (
        "no span costs less than 0.1 nats of KL; the lowest of 3 is dropping layers 0:2: "
        "0.120 nats of KL (0.110 to 0.130)"
    )


def test_a_span_of_two_families_is_counted_once() -> None:
    both = pd.concat([spans(0.02), spans(0.02, family="jump")])
    assert drop_sentence(both) == drop_sentence(spans(0.02))
    assert "the least of 2 spans of one layer" in drop_sentence(both)


def test_a_repeat_that_lowers_the_loss() -> None:
    frame = repeats(0.02, -0.05, 0.03)
    half = 0.001 * student.ppf(1 - 0.05 / 3 / 2, 15)
    assert repeat_sentences(frame) == [
        f"repeating layers 0:2 lowers the loss by 0.0500 nats ({0.05 - half:.4f} to {0.05 + half:.4f}, "
        "corrected for the choice among 3)",
        "repeating layers 0:3 costs 0.060 nats of KL (0.050 to 0.070), the least of 2 repeats longer than one layer",
    ]


def test_the_lowest_of_many_repeats_is_not_taken_for_a_gain() -> None:
    # Alone, -0.025 +- 0.01 would be below zero; as the lowest of 20 it is not.
    alone = repeats(-0.025, sem=0.01)
    assert repeat_sentences(alone) == ["repeating layers 0:1 lowers the loss by 0.025 nats (0.004 to 0.046)"]
    many = repeats(-0.025, *(0.1 + 0.001 * n for n in range(19)), sem=0.01)
    half = 0.01 * student.ppf(1 - 0.05 / 20 / 2, 15)
    assert repeat_sentences(many)[0] == (
        "no repeat surely lowers the loss; the lowest is repeating layers 0:1, which changes it by -0.025 nats "
        f"({-0.025 - half:.3f} to {-0.025 + half:.3f}, corrected for the choice among 20)"
    )


def test_no_repeat_lowers_the_loss() -> None:
    assert repeat_sentences(repeats(0.02, 0.03, sem=float("nan"))) == [
        "no repeat lowers the loss; the least harmful is repeating layers 0:1, "
        "which changes it by 0.02 nats (no interval)",
        "repeating layers 0:2 costs 0.060 nats of KL (0.050 to 0.070), the only repeat longer than one layer",
    ]


def test_a_gain_that_is_sure_comes_before_a_lower_one_that_is_not() -> None:
    frame = repeats(-0.05, -0.04)
    frame.loc[frame.plan == "repeat 0:1", "loss_change_nats_sem"] = 0.05
    assert repeat_sentences(frame)[0].startswith("repeating layers 0:2 lowers the loss by 0.0400 nats")


def test_a_run_that_stopped_has_the_intervals_of_one() -> None:
    frame = repeats(-0.05, 0.02).assign(interval=f"95 %, {STOPPING}", sequences=64)
    half = 0.001 * asymptotic_errors(64, 1 - 0.05 / 2)
    assert f"({0.05 - half:.4f} to {0.05 + half:.4f}, corrected" in repeat_sentences(frame)[0]


def pairs(replaced: dict[tuple[int, int], float], swapped: dict[tuple[int, int], float]) -> pd.DataFrame:
    rows = [("replace", f"replace {i} {j}", i, j, kl, kl) for (i, j), kl in replaced.items()]
    return cells(*rows, *(("swap-pairs", f"swap {i} {j}", i, j, kl, kl) for (i, j), kl in swapped.items()))


def test_replacing_and_swapping_are_compared_by_rank() -> None:
    rng = np.random.default_rng(0)
    replaced = {(i, j): float(rng.random()) for i in range(5) for j in range(5) if i != j}
    swapped = {(i, j): float(rng.random()) for i in range(5) for j in range(i + 1, 5)}
    del replaced[4, 0]  # measured in one direction only
    compared = [pair for pair in swapped if pair[::-1] in replaced]
    means = [(replaced[i, j] + replaced[j, i]) / 2 for i, j in compared]
    by_hand = np.corrcoef(rankdata(means), rankdata([swapped[pair] for pair in compared]))[0, 1]
    assert pair_sentence(pairs(replaced, swapped)) == (
        "the KL of replacing a layer by another (mean of both directions) and of swapping the two have a rank "
        f"correlation (Spearman) of {by_hand:.2f} over 9 pairs of layers"
    )


@pytest.mark.parametrize("missing", ["replace", "swap-pairs"])
def test_one_kind_of_pairs_is_compared_with_nothing(missing: str) -> None:
    values = {(i, j): 1.0 + i for i in range(4) for j in range(4) if i != j}
    frame = pairs(values, {(i, j): 1.0 + j for i, j in values if i < j})
    assert pair_sentence(frame).startswith("the KL of replacing")
    assert pair_sentence(frame[frame.edit != missing]) == ""
    assert pair_sentence(frame.assign(kl_nats=1.0)) == ""


def test_a_sweep_of_all_maps_is_described_and_one_without_is_not() -> None:
    frame = ls.sweep(tiny_model("llama"), "jump,replace,swap-pairs", tokens(3))
    said = describe_maps(frame)
    assert len(said) == 4
    lowest = frame[(frame.edit == "jump") & (frame["from"] < frame["to"])].sort_values("kl_nats").iloc[0]
    assert lowest.plan.removeprefix("drop ") in said[0]
    assert "15 pairs" in said[3]
    assert describe_maps(ls.sweep(tiny_model("llama"), "drop", tokens(2))) == []
