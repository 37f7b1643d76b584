"""The journal of a run, cut off and damaged at any byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layersurgery.errors import OutputError
from layersurgery.metrics.reference import METRICS
from layersurgery.runs.journal import Journal, Record

ROWS, OBSERVED = 3, 5


def record(batch: int, sequences: int = 2) -> Record:
    rng = np.random.default_rng(batch)
    return Record(
        2 * batch,
        [5 + batch] * sequences,
        rng.normal(size=(sequences, ROWS, len(METRICS))),
        rng.normal(size=(sequences, OBSERVED)),
        0.5,
    )


def written(path: Path, batches: int = 3) -> bytes:
    path.unlink(missing_ok=True)
    journal = Journal(path, ROWS, OBSERVED)
    for batch in range(batches):
        journal.append(batch, record(batch))
    return path.read_bytes()


def same(one: Record, other: Record) -> bool:
    return (one.first, one.counts, one.seconds) == (other.first, other.counts, other.seconds) and (
        one.values.tobytes() == other.values.tobytes() and one.observed.tobytes() == other.observed.tobytes()
    )


def test_what_is_appended_is_read_back_with_its_digits(tmp_path: Path) -> None:
    written(tmp_path / "j")
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert sorted(journal.records) == [0, 1, 2]
    assert all(same(journal.records[batch], record(batch)) for batch in range(3))
    assert journal.seconds == 1.5
    assert len(journal.sums()) == 6
    assert journal.sums().tokens == 2 * (5 + 6 + 7)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_cut_off_anywhere_it_keeps_the_whole_records_before(tmp_path: Path, data: st.DataObject) -> None:
    whole = written(tmp_path / "j")
    size = len(whole) // 3
    cut = data.draw(st.integers(0, len(whole)))
    (tmp_path / "j").write_bytes(whole[:cut])
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert sorted(journal.records) == list(range(cut // size))
    journal.append(9, record(9))
    again = Journal(tmp_path / "j", ROWS, OBSERVED)
    assert sorted(again.records) == [*range(cut // size), 9]
    assert same(again.records[9], record(9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(data=st.data())
def test_a_damaged_byte_costs_its_batch_and_is_never_taken_for_a_number(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(written(tmp_path / "j"))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "j").write_bytes(whole)
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    hit = place // (len(whole) // 3)
    assert hit not in journal.records
    assert set(range(hit)) <= set(journal.records)
    assert all(same(found, record(batch)) for batch, found in journal.records.items())


def test_rows_that_are_no_numbers_are_named_with_their_batches(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", ROWS, OBSERVED)
    for batch in range(3):
        bad = record(batch)
        if batch != 1:
            bad.values[1, 2, 0] = np.nan if batch else np.inf
        journal.append(batch, bad)
    assert journal.non_finite() == {2: [0, 2]}
    assert np.isnan(journal.sums().means()[2, 0])
    assert np.isfinite(journal.sums().means()[:2]).all()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*gone/j: No such file.*run the same command again"):
        Journal(tmp_path / "gone" / "j", ROWS, OBSERVED)
