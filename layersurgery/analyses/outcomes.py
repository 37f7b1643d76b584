"""Results of analyses in a directory: tables as parquet and csv, and the sums of each sequence that they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..atomic_io import atomic_file
from ..errors import UnsupportedEditError
from ..metrics.aggregation import SequenceSums
from ..metrics.reference import METRICS
from ..runs.journal import Journal
from ..runs.per_token import PARTS
from ..runs.tables import SEQUENCES, write_table
from ..sweeps.measurer import Measurer
from ..sweeps.results import sequence_table as by_model
from .inference_stages import stage_table
from .prediction_neurons import neuron_scores, neurons_per_block
from .signal_tables import DROP, FROM_TEXT, LENS, SignalTables

NEURONS, SCORES, STAGES, BOUNDARIES = "neurons", "neuron_scores", "stages", "boundaries"
ANALYSES = (*(signal for signal in FROM_TEXT if signal != DROP), NEURONS)
WORDS = {
    "attention": "attention to the five tokens before",
    "norms": "sizes of what attention and MLP add",
    LENS: "what each block would say (logit lens)",
    NEURONS: "prediction and suppression neurons",
    "similarity": "what swapped blocks add",
    STAGES: "all signals, and the four stages",
}
OnNeurons = Callable[[int, int], None]


def signals_of(analysis: str) -> tuple[str, ...]:
    """The signals to read off text for an analysis."""
    return FROM_TEXT if analysis == STAGES else (analysis,)


@dataclass(frozen=True, slots=True)
class TableOutput:
    """The results of a run that ends in tables of its own.

    Attributes:
        measurer: what was measured.
        name: of the model.
        make: the tables, by their names, the first one first.
    """

    measurer: Measurer
    name: str
    make: Callable[[SignalTables], dict[str, pd.DataFrame]]

    def table(self, journal: Journal) -> pd.DataFrame:
        """The first table so far."""
        return next(iter(self.make(SignalTables(self.measurer, journal.sequence_sums(), self.name)).values()))

    def write(self, directory: Path, journal: Journal) -> tuple[pd.DataFrame, list[str]]:
        """All tables; returns the first, and the files' names."""
        tables = SignalTables(self.measurer, journal.sequence_sums(), self.name)
        frames = self.make(tables)
        files = write_tables(directory, frames)
        self.measurer.skipped.update(tables.skipped)
        rows = (
            sums_table(tables)
            if self.measurer.observer
            else by_model(self.measurer.variants, tables.sums_by_sequence.sums())
        )
        with atomic_file(directory / SEQUENCES) as partial:
            pq.write_table(rows, partial, compression="zstd")
        return next(iter(frames.values())), [*files, SEQUENCES]


@dataclass(frozen=True, slots=True)
class AnalysisOutput:
    """The results of one analysis, or of all of them for the stages.

    Attributes:
        analysis: of `ANALYSES`, or "stages".
        measurer: what was measured.
        name: of the model.
        on_neurons: is called after each block's neurons with the number of blocks done and of all.
    """

    analysis: str
    measurer: Measurer
    name: str
    on_neurons: OnNeurons | None = None

    def table(self, journal: Journal) -> pd.DataFrame:
        """The table so far."""
        return self._tables(journal.sequence_sums()).of(LENS if self.analysis == STAGES else self.analysis)

    def write(self, directory: Path, journal: Journal) -> tuple[pd.DataFrame, list[str]]:
        """All tables; returns the first, and the files' names."""
        tables = self._tables(journal.sequence_sums())
        frames = {signal: tables.of(signal) for signal in signals_of(self.analysis)}
        if self.analysis == STAGES:
            found = self._neurons(directory)
            frames |= {} if found is None else {SCORES: found, NEURONS: neurons_per_block(found, self.name)}
            together = stage_table(tables, frames.get(NEURONS))
            frames = {STAGES: together, BOUNDARIES: boundary_table(together), **frames}
        self.measurer.skipped.update(tables.skipped)
        files = write_tables(directory, frames)
        with atomic_file(directory / SEQUENCES) as partial:
            pq.write_table(sums_table(tables), partial, compression="zstd")
        return next(iter(frames.values())), [*files, SEQUENCES]

    def _tables(self, sample: SequenceSums) -> SignalTables:
        return SignalTables(self.measurer, sample, self.name)

    def _neurons(self, directory: Path) -> pd.DataFrame | None:
        """Scores of all neurons; None where the model has none."""
        try:
            found = self._looked_at(directory)
        except UnsupportedEditError as error:
            self.measurer.skipped["neurons"] = str(error)
            return None
        self.measurer.skipped.update(found.attrs["skipped"])
        return found

    def _looked_at(self, directory: Path) -> pd.DataFrame:
        """The same, kept for a start after this one."""
        kept = directory / PARTS / f"{SCORES}.parquet"
        if kept.exists():
            try:
                return _read_scores(kept)
            except (OSError, pa.ArrowInvalid, KeyError):
                kept.unlink()
        runner = self.measurer.runner
        found = neuron_scores(self.measurer.model, anatomy=runner.anatomy, progress=self.on_neurons)
        kept.parent.mkdir(exist_ok=True)
        with atomic_file(kept) as partial:
            table = pa.Table.from_pandas(found, preserve_index=False)
            pq.write_table(
                table.replace_schema_metadata(
                    {**(table.schema.metadata or {}), b"attrs": json.dumps(found.attrs).encode()}
                ),
                partial,
            )
        return found


def boundary_table(stages: pd.DataFrame) -> pd.DataFrame:
    """The limits between stages as a table."""
    return pd.DataFrame(stages.attrs["boundaries"]).astype(dict.fromkeys(("layer", "low", "high"), "Int64"))


def _read_scores(path: Path) -> pd.DataFrame:
    table = pq.read_table(path)
    found = table.to_pandas()
    found.attrs.update(json.loads(table.schema.metadata[b"attrs"]))
    return found


def write_tables(directory: Path, frames: dict[str, pd.DataFrame]) -> list[str]:
    """Write tables as parquet and csv, each file whole or not at all; returns their names. The scores of single neurons are parquet only."""
    files = []
    for name, frame in frames.items():
        plain = frame.copy()
        plain.attrs.clear()
        files += write_table(directory, name, plain, csv=name != SCORES)
    return files


def sums_table(tables: SignalTables) -> pa.Table:
    """Sums and counts of each sequence: a row for each sequence and quantity, from which all means and errors can be had again."""
    sample, measurer = tables.sums_by_sequence, tables.measurer
    sequences = len(sample.counts)
    columns: list[tuple[str, int | None, str, str, np.ndarray, np.ndarray]] = []
    for row, variant in enumerate(measurer.variants):
        if len(measurer.variants) > 1:
            for place, metric in enumerate(METRICS):
                columns.append((variant.edit, variant.layer, "", metric, sample.values[:, row, place], sample.counts))
    for quantity in measurer.observer.quantities if measurer.observer is not None else ():
        sums, counts = tables.sums(quantity.layer, quantity.part, quantity.name)
        columns.append((quantity.signal, quantity.layer, quantity.part, quantity.name, sums, counts))
    each = [[column[place] for column in columns for _ in range(sequences)] for place in range(4)]
    return pa.table(
        {
            "sequence": pa.array(np.tile(sample.numbers, len(columns)), pa.int32()),
            "signal": pa.array(each[0]).dictionary_encode(),
            "layer": pa.array(each[1], pa.int32()),
            "part": pa.array(each[2]).dictionary_encode(),
            "name": pa.array(each[3]).dictionary_encode(),
            "sum": pa.array(np.concatenate([column[4] for column in columns]), pa.float64()),
            "count": pa.array(np.concatenate([column[5] for column in columns]).astype("int64"), pa.int64()),
        }
    )
