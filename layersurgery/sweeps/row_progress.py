"""Keep which batches every row of a result has been measured on, and say what to measure next.

Without a rule, every row needs every batch. With one, the rule is asked which rows need no more text, after each of the
first twenty batches and then whenever there is a twentieth more; these rows leave the schedule. What it answers depends
on the sums of the batches up to there alone: neither on the number of processes nor on interruptions. A batch that was
measured on a row after it left is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import MeasurementError
from ..metrics.aggregation import Array, BatchResult, SequenceSums

BatchRows = tuple[int, tuple[int, ...] | None]
"""Number of a batch, and the rows to measure on it; None for all."""


class StopRule(Protocol):
    """Rule that says which rows need no more text."""

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records of the rule. A finished run with another record is continued."""

    def finished(self, values: Array, counts: Array, rows: Sequence[int]) -> set[int]:
        """Return which of the rows need no more text.

        Args:
            values: sums by sequence of all rows, (sequences, rows, len(METRICS)); NaN in rows that left before.
            counts: positions of each sequence, (sequences,), none of them 0.
            rows: the rows that are still measured.
        """


class RowProgress:
    """Progress of each row of a result.

    Args:
        rows: number of rows; row 0 is the unedited model, which is measured wherever another row is.
        batches: number of batches of the text.
        rule: says which rows need no more text; None to measure every row on every batch.
        results: measured batches by number.

    Attributes:
        results: the measured batches by number.
        finished: for each row that needs no more text, the number of batches it uses; the unedited model is not among
            them.
    """

    def __init__(
        self,
        rows: int,
        batches: int,
        rule: StopRule | None = None,
        results: Mapping[int, BatchResult] | None = None,
    ) -> None:
        self.rows, self.batches, self.rule = rows, batches, rule
        self.results: dict[int, BatchResult] = dict(results or {})
        self.finished: dict[int, int] = {}
        self._complete = 0  # so many batches from the first are measured on every row that needs them
        self._next_look = 1
        self._ask()

    def add(self, batch: int, result: BatchResult) -> None:
        """Add a measured batch, or rows of it that were missing."""
        self.results[batch] = self.results[batch].merge(result) if batch in self.results else result
        self._ask()

    @property
    def active(self) -> list[int]:
        """Return the rows that need more text, as far as it is known; the unedited model is not among them."""
        return [row for row in range(1, self.rows) if row not in self.finished]

    def _ask(self) -> None:
        """Ask the rule after every batch at which it is to be asked, as far as batches are complete."""
        while self.rule is not None and (active := self.active) and self._complete in self.results:
            if not all(map(self.results[self._complete].has, active)):
                return
            self._complete += 1
            if self._complete < min(self._next_look, self.batches):
                continue
            self._next_look = self._complete + max(1, self._complete // 20)
            results = [self.results[batch] for batch in range(self._complete)]
            counts = np.concatenate([np.array(result.counts, float) for result in results])
            values = np.concatenate([result.values for result in results])
            for row in sorted(self.rule.finished(values[counts > 0], counts[counts > 0], active)):
                self.finished[row] = self._complete

    def rows_of(self, batch: int) -> tuple[int, ...] | None:
        """Return the rows that use a batch, with the unedited model; None for all."""
        rows = [row for row in range(1, self.rows) if batch < self.finished.get(row, self._complete)]
        return None if len(rows) == self.rows - 1 else (0, *rows)

    def next(self, most: int) -> list[BatchRows]:
        """Return the batches to measure next, `most` of them or fewer, each with its rows; empty at the end."""
        work: list[BatchRows] = []
        if self.rule is None:
            while self._complete in self.results and all(map(self.results[self._complete].has, self.active)):
                self._complete += 1
        active = self.active
        for batch in range(self._complete, self.batches if active or self.rule is None else 0):
            known = self.results.get(batch)
            missing = active if known is None else [row for row in active if not known.has(row)]
            if known is None or missing:
                work.append((batch, None if len(missing) == self.rows - 1 else (0, *missing)))
            if len(work) == most:
                break
        return work

    def sums(self) -> SequenceSums:
        """Return the sums of all sequences that a row uses, in the order of the sequences.

        Raises:
            MeasurementError: no batch is complete yet.
        """
        if self.rule is None:
            return SequenceSums.of(self.results.values())
        used = np.array([0, *(self.finished.get(row, self._complete) for row in range(1, self.rows))])
        used[0] = used.max()
        batches = range(used[0])
        if not batches:
            raise MeasurementError("no batch has been measured on all edits yet")
        return SequenceSums.of([self.results[batch] for batch in batches], [batch < used for batch in batches])
