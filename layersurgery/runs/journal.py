"""Store the measured batches of a run, so that a run that is killed at any moment can resume.

Each batch is one file, which is on the disk when `append` returns. A file that cannot be read is ignored, and its batch
is measured again.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal

import numpy as np

from ..atomic_io import atomic_file
from ..errors import OutputError
from ..metrics.aggregation import BatchResult
from ..metrics.reference import METRICS
from ..metrics.tails import Tails

_TAILS = {f"tails_{field.name}": field.name for field in fields(Tails)}
_RESUME = "The batches measured before are kept; fix this problem, then run the same command again to resume"


class Journal:
    """Journal of the measured batches of a run.

    Args:
        directory: its directory; created if it does not exist.
        rows: number of measured models.
        observed: how many numbers the observer stores for each sequence.
        tails: whether batches have tails.

    Attributes:
        results: the measured batches by number.

    Raises:
        OutputError: the directory cannot be written; `append` raises it too.
    """

    def __init__(self, directory: Path, rows: int, observed: int = 0, *, tails: bool = False) -> None:
        self.directory, self.rows, self.observed, self.tails = directory, rows, observed, tails
        self.results: dict[int, BatchResult] = {}
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {directory}: {error.strerror or error}. {_RESUME}") from error
        for path in sorted(directory.glob("[0-9]*.npz")):
            if (result := self._read(path)) is not None:
                self.results[int(path.stem)] = result

    def _read(self, path: Path) -> BatchResult | None:
        """Read the result of a batch; return None for a damaged file. Its checksums tell."""
        try:
            with np.load(path, allow_pickle=False) as file:
                result = BatchResult(
                    int(file["first"]), file["counts"].tolist(), file["values"], file["observed"],
                    float(file["seconds"]), rows=tuple(file["rows"].tolist()) or None if "rows" in file else None,
                    tails=Tails(*(file[name] for name in _TAILS)) if self.tails else None,
                )  # fmt: skip
        except Exception:  # a damaged file may raise any exception
            return None
        return result if self._has_shapes(result) else None

    def _has_shapes(self, result: BatchResult) -> bool:
        sequences = len(result.counts)
        shapes = (sequences, self.rows, len(METRICS)), (sequences, self.observed)
        return (
            (result.values.shape, result.observed.shape) == shapes
            and self.tails == (result.tails is not None)
            and (result.tails is None or result.tails.has_shapes(sequences, self.rows))
        )

    def append(self, batch: int, result: BatchResult) -> None:
        """Append a batch, or rows that an earlier result of it does not have. It is on the disk when this returns.

        Args:
            batch: its number.
            result: its result.

        Raises:
            OutputError: the file cannot be written.
        """
        assert self._has_shapes(result)
        if batch in self.results:
            result = self.results[batch].merge(result)
        names = ("first", "counts", "values", "observed", "seconds")
        arrays = {**{name: getattr(result, name) for name in names}, "rows": np.array(result.rows or (), int)}
        if result.tails is not None:
            arrays |= {name: getattr(result.tails, field) for name, field in _TAILS.items()}
        try:
            with atomic_file(self.directory / f"{batch:06}.npz") as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        except OutputError as error:
            raise OutputError(f"{error}. {_RESUME}") from error
        self.results[batch] = result

    @property
    def seconds(self) -> float:
        """Return the time that all measured batches took together."""
        return sum(result.seconds for result in self.results.values())

    def non_finite(self, values: Literal["values", "observed"]) -> dict[int, list[int]]:
        """Return the batches with NaN or infinity, for each row of the values or column of the observer that has it."""
        batches_by_index: dict[int, list[int]] = {}
        for batch, result in sorted(self.results.items()):
            wrong = ~np.isfinite(getattr(result, values))
            if values == "values" and result.rows is not None:
                wrong &= np.isin(np.arange(self.rows), result.rows)[None, :, None]
            for index in np.flatnonzero(wrong.any(tuple(axis for axis in range(wrong.ndim) if axis != 1))).tolist():
                batches_by_index.setdefault(index, []).append(batch)
        return batches_by_index
