"""The journal of a run: files that are cut off or damaged at any byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layersurgery.errors import OutputError
from layersurgery.metrics.aggregation import BatchResult, SequenceSums
from layersurgery.metrics.reference import METRICS, TOKEN_TAILS
from layersurgery.metrics.tails import Tails, row_tails
from layersurgery.runs.journal import Journal

ROWS, OBSERVED = 3, 5


def batch_result(batch: int, sequences: int = 2) -> BatchResult:
    rng = np.random.default_rng(batch)
    return BatchResult(
        2 * batch,
        [5 + batch] * sequences,
        rng.normal(size=(sequences, ROWS, len(METRICS))),
        rng.normal(size=(sequences, OBSERVED)),
        0.5,
    )


def written(directory: Path, batches: int = 3) -> None:
    journal = Journal(directory, ROWS, OBSERVED)
    for batch in range(batches):
        journal.append(batch, batch_result(batch))


def same(one: BatchResult, other: BatchResult) -> bool:
    return (one.first, one.counts, one.seconds) == (other.first, other.counts, other.seconds) and (
        one.values.tobytes() == other.values.tobytes() and one.observed.tobytes() == other.observed.tobytes()
    )


def test_what_is_appended_is_read_back_with_its_digits(tmp_path: Path) -> None:
    written(tmp_path / "j")
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert sorted(journal.results) == [0, 1, 2]
    assert all(same(journal.results[batch], batch_result(batch)) for batch in range(3))
    assert journal.seconds == 1.5
    sums = SequenceSums.of(journal.results.values())
    assert len(sums) == 6
    assert sums.tokens == 2 * (5 + 6 + 7)
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == ["000000.npz", "000001.npz", "000002.npz"]


def test_tails_are_read_back_and_batches_without_them_are_measured_again(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    positions = torch.rand(len(METRICS) + len(TOKEN_TAILS), 10, generator=rng, dtype=torch.float64)
    tails = Tails.stack({row: row_tails(positions, [6, 4]) for row in range(ROWS)}, 2, ROWS)
    Journal(tmp_path / "j", ROWS, OBSERVED, tails=True).append(0, replace(batch_result(0), tails=tails))
    read = Journal(tmp_path / "j", ROWS, OBSERVED, tails=True).results[0].tails
    assert read is not None
    assert [part.tobytes() for part in (read.values, read.kl, read.calibration)] == [
        part.tobytes() for part in (tails.values, tails.kl, tails.calibration)
    ]
    written(tmp_path / "without", 1)
    assert not Journal(tmp_path / "without", ROWS, OBSERVED, tails=True).results


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_that_is_cut_off_anywhere_costs_its_batch(tmp_path: Path, data: st.DataObject) -> None:
    written(tmp_path / "j")
    path = tmp_path / "j" / "000001.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert sorted(journal.results) == [0, 2]
    journal.append(1, batch_result(1))
    assert path.read_bytes() == whole
    assert sorted(Journal(tmp_path / "j", ROWS, OBSERVED).results) == [0, 1, 2]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_is_never_taken_for_a_number(tmp_path: Path, data: st.DataObject) -> None:
    written(tmp_path / "j")
    path = tmp_path / "j" / "000001.npz"
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert {0, 2} <= set(journal.results)
    assert all(same(found, batch_result(batch)) for batch, found in journal.results.items())


def test_a_damaged_number_costs_its_batch(tmp_path: Path) -> None:
    written(tmp_path / "j")
    path = tmp_path / "j" / "000001.npz"
    whole = path.read_bytes()
    for numbers in (batch_result(1).values, batch_result(1).observed):
        position = whole.index(numbers.tobytes()) + 11
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert sorted(Journal(tmp_path / "j", ROWS, OBSERVED).results) == [0, 2]


def test_results_of_other_models_and_other_files_are_not_read(tmp_path: Path) -> None:
    written(tmp_path / "j")
    (tmp_path / "j" / ".000007.npz.partial").write_bytes(b"a killed run")
    (tmp_path / "j" / "000008.npz").mkdir()
    assert sorted(Journal(tmp_path / "j", ROWS, OBSERVED).results) == [0, 1, 2]
    assert not Journal(tmp_path / "j", ROWS + 1, OBSERVED).results
    assert not Journal(tmp_path / "j", ROWS, OBSERVED - 1).results


def test_rows_that_are_no_numbers_are_named_with_their_batches(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    for batch in range(3):
        bad = batch_result(batch)
        if batch != 1:
            bad.values[1, 2, 0] = np.nan if batch else np.inf
        bad.observed[0, 3 + batch // 2] = np.nan
        journal.append(batch, bad)
    assert journal.non_finite("values") == {2: [0, 2]}
    assert journal.non_finite("observed") == {3: [0, 1], 4: [2]}
    means, _ = SequenceSums.of(journal.results.values()).means_and_errors()
    assert np.isnan(means[2, 0])
    assert np.isfinite(means[:2]).all()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot create .*gone/j: No such file.*run the same command again"):
        Journal(tmp_path / "gone" / "j", ROWS, OBSERVED)
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    (tmp_path / "j").rmdir()
    with pytest.raises(OutputError, match=r"cannot write .*000000.npz: No such file.*run the same command again"):
        journal.append(0, batch_result(0))
    assert not journal.results
