"""What a run has measured so far, on disk: a file that only grows, and that a kill at any moment leaves readable.

Each record holds one batch and its checksum, and is durable when `append` returns. A record that is cut off ends the file; one that
is damaged is passed over. Either way its batch is measured again.
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
    """One batch.

    Attributes:
        first: number of its first sequence.
        counts: positions measured in each sequence.
        values: sums over them, (sequences, rows, metrics).
        observed: what was read off the blocks, (sequences, numbers).
        seconds: that it took.
    """

    first: int
    counts: list[int]
    values: Array
    observed: Array
    seconds: float


@contextmanager
def _durable(path: Path, mode: str) -> Iterator[Any]:
    """A file that is on the disk when the `with` block ends."""
    try:
        with path.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. What was measured before stays; once that is mended, the same command goes on "
            "with it"
        ) from error


class Journal:
    """The measured batches of a run.

    Args:
        path: the file; made if it is not there. What is unreadable at its end is cut off.
        rows: how many models are measured.
        observed: numbers read off the blocks of each sequence.

    Raises:
        OutputError: it cannot be written; also `append`.
    """

    def __init__(self, path: Path, rows: int, observed: int = 0) -> None:
        self.path, self.rows, self.observed = path, rows, observed
        self.records: dict[int, Record] = {}
        with _durable(path, "a+b") as file:
            file.seek(0)
            file.truncate(self._read(file.read()))

    def _read(self, data: bytes) -> int:
        """Take in all whole records; returns where the last of them ends."""
        end = 0
        while end + _HEAD.size <= len(data):
            magic, batch, first, sequences, seconds = _HEAD.unpack_from(data, end)
            each = self.rows * len(METRICS) + self.observed
            stop = end + _HEAD.size + 8 * sequences * (1 + each) + _CHECK.size
            if magic != _MAGIC or stop > len(data):
                break
            (check,) = _CHECK.unpack_from(data, stop - _CHECK.size)
            if check == zlib.crc32(data[end : stop - _CHECK.size]):
                start = end + _HEAD.size
                counts = np.frombuffer(data, "<i8", sequences, start).tolist()
                found = (
                    np.frombuffer(data, "<f8", sequences * each, start + 8 * sequences)
                    .reshape(sequences, each)
                    .astype(float)
                )
                values, observed = np.split(found, [each - self.observed], axis=1)
                self.records[batch] = Record(first, counts, values.reshape(sequences, self.rows, -1), observed, seconds)
            end = stop
        return end

    def append(self, batch: int, record: Record) -> None:
        """Note a batch; it is on the disk when this returns."""
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
        """Time that measuring has taken."""
        return sum(record.seconds for record in self.records.values())

    def sums(self) -> MetricSums:
        """All sums so far."""
        sums = MetricSums(self.rows)
        for record in self.records.values():
            for offset, count in enumerate(record.counts):
                if count:
                    sums.add(record.first + offset, count, record.values[offset])
        return sums

    def sequence_sums(self) -> SequenceSums:
        """All sequences so far, in their order."""
        return SequenceSums.of(
            [(record.first, record.counts, record.values, record.observed) for record in self.records.values()]
        )

    def non_finite(self) -> dict[int, list[int]]:
        """Rows with values that are no numbers, and the batches in which they came up."""
        found: dict[int, list[int]] = {}
        for batch, record in sorted(self.records.items()):
            for row in np.flatnonzero(~np.isfinite(record.values).all((0, 2))).tolist():
                found.setdefault(row, []).append(batch)
        return found

    def non_finite_observed(self) -> dict[int, list[int]]:
        """The same for numbers read off the blocks."""
        found: dict[int, list[int]] = {}
        for batch, record in sorted(self.records.items()):
            for number in np.flatnonzero(~np.isfinite(record.observed).all(0)).tolist():
                found.setdefault(number, []).append(batch)
        return found
