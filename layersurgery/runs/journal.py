"""Store the measured batches of a run in an append-only file, so that a run that is killed at any moment can resume.

Each record holds one batch and its checksum, and is on the disk when `append` returns. Reading stops at a truncated
record and skips a damaged one. In both cases the batch is measured again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..metrics.aggregation import Array, MetricSums, SequenceSums
from ..metrics.reference import METRICS

_MAGIC = b"lsj1"
_HEAD = struct.Struct("<4sIIId")  # magic, batch, first sequence, sequences, seconds
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Record:
    """Result of one batch, as the journal stores it.

    Attributes:
        first: number of its first sequence.
        counts: number of positions measured in each sequence.
        values: sums over these positions, (sequences, rows, metrics).
        observed: counts and sums of the observer, (sequences, numbers).
        seconds: time that the batch took.
    """

    first: int
    counts: list[int]
    values: Array
    observed: Array
    seconds: float


@contextmanager
def _durable(path: Path, mode: str) -> Iterator[Any]:
    """Open a file whose content is on the disk when the `with` block ends."""
    try:
        with path.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. The batches measured before are kept; fix this problem, "
            "then run the same command again to resume"
        ) from error


class Journal:
    """Journal of the measured batches of a run.

    Args:
        path: the file; created if it does not exist. An unreadable end is truncated.
        rows: number of measured models.
        observed: how many numbers the observer stores for each sequence.

    Attributes:
        records: the measured batches by number.

    Raises:
        OutputError: the file cannot be written; `append` raises it too.
    """

    def __init__(self, path: Path, rows: int, observed: int = 0) -> None:
        self.path, self.rows, self.observed = path, rows, observed
        self.records: dict[int, Record] = {}
        with _durable(path, "a+b") as file:
            file.seek(0)
            file.truncate(self._read(file.read()))

    def _read(self, data: bytes) -> int:
        """Read all complete records, and return the offset at which the last of them ends."""
        end = 0
        while end + _HEAD.size <= len(data):
            magic, batch, first, sequences, seconds = _HEAD.unpack_from(data, end)
            numbers_per_sequence = self.rows * len(METRICS) + self.observed
            stop = end + _HEAD.size + 8 * sequences * (1 + numbers_per_sequence) + _CHECK.size
            if magic != _MAGIC or stop > len(data):
                break
            (check,) = _CHECK.unpack_from(data, stop - _CHECK.size)
            if check == zlib.crc32(data[end : stop - _CHECK.size]):
                start = end + _HEAD.size
                counts = np.frombuffer(data, "<i8", sequences, start).tolist()
                numbers = (
                    np.frombuffer(data, "<f8", sequences * numbers_per_sequence, start + 8 * sequences)
                    .reshape(sequences, numbers_per_sequence)
                    .astype(float)
                )
                values, observed = np.split(numbers, [numbers_per_sequence - self.observed], axis=1)
                self.records[batch] = Record(first, counts, values.reshape(sequences, self.rows, -1), observed, seconds)
            end = stop
        return end

    def append(self, batch: int, record: Record) -> None:
        """Append a batch. It is on the disk when this returns.

        Args:
            batch: its number.
            record: its result.

        Raises:
            OutputError: the file cannot be written.
        """
        assert record.values.shape == (len(record.counts), self.rows, len(METRICS))
        assert record.observed.shape == (len(record.counts), self.observed)
        head = _HEAD.pack(_MAGIC, batch, record.first, len(record.counts), record.seconds)
        numbers = np.concatenate([record.values.reshape(len(record.counts), -1), record.observed], 1)
        data = head + np.array(record.counts, "<i8").tobytes() + numbers.astype("<f8").tobytes()
        with _durable(self.path, "ab") as file:
            file.write(data + _CHECK.pack(zlib.crc32(data)))
        self.records[batch] = record

    @property
    def seconds(self) -> float:
        """Return the time that all measured batches took together."""
        return sum(record.seconds for record in self.records.values())

    def sums(self) -> MetricSums:
        """Return the sums of metrics of all measured batches."""
        sums = MetricSums(self.rows)
        for record in self.records.values():
            for offset, count in enumerate(record.counts):
                if count:
                    sums.add(record.first + offset, count, record.values[offset])
        return sums

    def sequence_sums(self) -> SequenceSums:
        """Return the sums of all measured sequences, in the order of the sequences."""
        return SequenceSums.of(
            [(record.first, record.counts, record.values, record.observed) for record in self.records.values()]
        )

    def non_finite(self) -> dict[int, list[int]]:
        """Return for each row with NaN or infinite values the batches that have them."""
        batches_by_row: dict[int, list[int]] = {}
        for batch, record in sorted(self.records.items()):
            for row in np.flatnonzero(~np.isfinite(record.values).all((0, 2))).tolist():
                batches_by_row.setdefault(row, []).append(batch)
        return batches_by_row

    def non_finite_observed(self) -> dict[int, list[int]]:
        """Return for each column of the observer with NaN or infinite values the batches that have them."""
        batches_by_column: dict[int, list[int]] = {}
        for batch, record in sorted(self.records.items()):
            for column in np.flatnonzero(~np.isfinite(record.observed).all(0)).tolist():
                batches_by_column.setdefault(column, []).append(batch)
        return batches_by_column
