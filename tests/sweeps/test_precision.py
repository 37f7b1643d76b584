"""Sweeps that stop when their answer is known: what is asked, who leaves when, and what the table then says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.errors import PlanError
from layersurgery.metrics.aggregation import BatchResult
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.precision import Precision, Target
from layersurgery.sweeps.row_progress import RowProgress
from tests.support.zoo import DEPTH, tiny_model, tokens

ROWS, SIZE, BATCHES = 4, 4, 40
KL = METRICS.index("kl_nats")


def made_up(batch: int, rows: tuple[int, ...] | None = None, seed: int = 0) -> BatchResult:
    """Return a batch in which the rows' KL spreads more from row to row."""
    rng = np.random.default_rng([seed, batch])
    values = np.zeros((SIZE, ROWS, len(METRICS)))
    values[:, :, KL] = 10 * (1 + rng.normal(0, [0, 0.03, 0.12, 3], (SIZE, ROWS)))
    if rows is not None:
        values[:, [row for row in range(ROWS) if row not in rows]] = np.nan
    return BatchResult(SIZE * batch, [10] * SIZE, values, np.zeros((SIZE, 0)), rows=rows)


def measured(rule: Precision, processes: int = 1, known: RowProgress | None = None) -> RowProgress:
    progress = RowProgress(ROWS, BATCHES, rule, None if known is None else known.results)
    while work := progress.next(processes):
        assert len(work) <= processes
        for batch, rows in work:
            progress.add(batch, made_up(batch, rows))
    return progress


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("agreement=0.5pt", [Target("agreement", 0.005, relative=False)]),
        (
            " kl = 2% , loss=0.01nats",
            [Target("kl_nats", 0.02, relative=True), Target("loss_nats", 0.01, relative=False)],
        ),
        ("entropy=.1 bits", [Target("entropy_bits", 0.1, relative=False)]),
        ("loss_change_nats=1e-3nats", [Target("loss_change_nats", 1e-3, relative=False)]),
        ("accuracy=5%", [Target("accuracy", 0.05, relative=True)]),
    ],
)
def test_conditions_are_parsed(text: str, targets: list[Target]) -> None:
    assert list(Precision.parse(text).targets) == targets
    by_metric = dict(part.split("=") for part in text.replace(" ", "").split(","))
    assert list(Precision.parse(by_metric).targets) == targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agrement=1pt", "did you mean agreement"),
        ("speed=1%", "the metrics are kl, agreement, entropy"),
        ("kl=1", r"`until` kl=1: give an amount such as kl=2% of the mean, or kl=0.01nats"),
        ("kl=1pt", "0.01nats"),
        ("agreement=0.01nats", r"0.5pt \(percentage points\)"),
        ("kl=0%", "give an amount"),
        ("kl=-1%", "give an amount"),
        ("kl", "give an amount"),
        ("", "`until` is empty"),
        ("kl=1%,kl_nats=2%", "twice"),
        (3, "`until` is text such as"),
    ],
)
def test_conditions_that_cannot_be_understood(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Precision.parse(text)


@pytest.mark.parametrize("confidence", [95, 0.2, 1, "much"])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(PlanError, match="share between 0.5 and 1"):
        Precision.parse("kl=1%", confidence)


def test_rows_leave_when_they_are_precise_and_not_before() -> None:
    rule = Precision.parse("kl=5%").for_text(torch.ones(1, 11))
    progress = measured(rule)
    assert progress.finished[1] < progress.finished[2] < BATCHES
    assert progress.active == [3]
    values = np.concatenate([made_up(batch).values for batch in range(BATCHES)])
    counts = np.full(SIZE * BATCHES, 10.0)
    for row, batches in progress.finished.items():
        enough = [rule.reached(values[: SIZE * n, row], counts[: SIZE * n]) for n in range(1, batches + 1)]
        assert enough == [False] * (batches - 1) + [True]
    sums = progress.sums()
    for row in range(ROWS):
        expected = SIZE * progress.finished.get(row, BATCHES)
        assert sums.of_row(row)[0].tobytes() == values[:expected, row].tobytes()
    # Each row was measured on the batches up to there only.
    assert [result.has(1) for _, result in sorted(progress.results.items())].count(True) == progress.finished[1]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_number_of_processes_changes_no_digit(processes: int) -> None:
    rule = Precision.parse("kl=5%").for_text(torch.ones(1, 11))
    alone, together = measured(rule), measured(rule, processes)
    assert together.finished == alone.finished
    assert [found.tobytes() for found in together.sums().means_and_errors()] == [
        meant.tobytes() for meant in alone.sums().means_and_errors()
    ]


def test_more_precision_goes_on_from_what_is_known() -> None:
    loose, tight = (Precision.parse(text).for_text(torch.ones(1, 11)) for text in ("kl=5%", "kl=4%"))
    first = measured(loose)
    before = {batch: result.rows for batch, result in first.results.items()}
    on, fresh = measured(tight, known=first), measured(tight)
    assert on.finished == fresh.finished
    assert on.finished[2] > first.finished[2]
    assert on.sums().means_and_errors()[0].tobytes() == fresh.sums().means_and_errors()[0].tobytes()
    # What was known is not measured again.
    again = RowProgress(ROWS, BATCHES, tight, first.results).next(BATCHES)
    assert all(rows is not None and not set(rows[1:]) & set(before[batch] or range(ROWS)) for batch, rows in again)
    back = measured(loose, known=on)
    assert back.finished == first.finished
    assert back.sums().means_and_errors()[0].tobytes() == first.sums().means_and_errors()[0].tobytes()


def sweep(**options: Any) -> pd.DataFrame:
    return ls.sweep(tiny_model("llama"), "swap,drop", tokens(96, 12), **options)


def test_a_row_that_stopped_has_the_digits_of_a_sweep_on_its_text() -> None:
    frame = sweep(until="kl=15%", batch_size=4, tails=True)
    assert frame.sequences.nunique() > 2
    assert frame.sequences[0] == frame.sequences.max()
    for count in sorted(set(frame.sequences[1:])):
        whole = ls.sweep(tiny_model("llama"), "swap,drop", tokens(96, 12)[:count], batch_size=4, tails=True)
        rows = frame.index[frame.sequences == count]
        for name in ("tokens", "kl_nats", "kl_nats_sem", "agreement", "loss_nats", "entropy_bits", "kl_nats_p90"):
            assert frame[name][rows].tolist() == whole[name][rows].tolist()
    narrow = (frame.kl_nats_high - frame.kl_nats_low) / 2 <= 0.15 * frame.kl_nats.abs()
    assert (frame.precise[1:] == narrow[1:]).all()
    assert frame.precise[1:].any()
    assert set(frame.interval) == {"95 %, at every number of sequences"}


def test_a_row_that_did_not_get_there_says_so() -> None:
    frame = sweep(until="kl=0.01%")
    assert not frame.precise[1:].any()
    assert set(frame.sequences) == {96}


def test_a_sweep_without_conditions_has_students_intervals() -> None:
    frame = sweep()
    assert "precise" not in frame
    assert set(frame.interval) == {"95 %, for this number of sequences"}
    assert ((frame.kl_nats_high + frame.kl_nats_low) / 2 - frame.kl_nats).abs().max() < 1e-12
    half = frame.kl_nats_sem * 1.9852510035054973  # Student's t for 95 degrees of freedom
    assert ((frame.kl_nats_high - frame.kl_nats_low) / 2 - half).abs().max() < 1e-12


def test_routes_that_left_are_not_run() -> None:
    model, edits = tiny_model("llama"), variants("drop", DEPTH)
    measurer = Measurer(model, edits)
    ids = tokens(2, 9)
    whole = measurer.measure(ids, torch.ones_like(ids))
    part = measurer.measure(ids, torch.ones_like(ids), (0, 2))
    alone = Measurer(model, [edits[1]]).measure(ids, torch.ones_like(ids))
    assert part.calls == alone.calls < whole.calls
    assert part.values[:, [0, 2]].tobytes() == whole.values[:, [0, 2]].tobytes()
    assert np.isnan(part.values[:, [1, 3]]).all()
    assert measurer.measure(ids, torch.ones_like(ids)).values.tobytes() == whole.values.tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "kl=1%", "per_token": True}, "per_token"),
        ({"confidence": 0.9}, "`confidence` has an effect only with `until`"),
        ({"read": "1/4", "per_token": True}, "per_token"),
        ({"read": "1/4", "tails": True}, "`tails` needs every position; leave `read` out"),
        ({"read": "3/2"}, "`read` is a share"),
        ({"read": 0}, "`read` is a share"),
        ({"read": "some"}, "`read` is a share"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        sweep(directory=tmp_path, **options)


def test_without_conditions_every_row_gets_the_batches_that_it_lacks() -> None:
    first = measured(Precision.parse("kl=5%").for_text(torch.ones(1, 11)))
    everything = RowProgress(ROWS, BATCHES, None, first.results)
    lacking = dict(everything.next(BATCHES))
    assert lacking == {
        batch: (0, *(row for row in range(1, ROWS) if not first.results[batch].has(row)))
        for batch in range(BATCHES)
        if not all(map(first.results[batch].has, range(ROWS)))
    }
    while work := everything.next(3):
        for batch, rows in work:
            everything.add(batch, made_up(batch, rows))
    assert np.isfinite(everything.sums().values).all()
    assert len(everything.sums()) == SIZE * BATCHES
