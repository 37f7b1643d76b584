"""Write the results of an analysis to a directory: tables as Parquet and CSV, and the sums of each sequence."""

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
from ..registry import ANALYSES
from ..runs.per_token import PARTS
from ..runs.tables import SEQUENCES, write_tables
from ..sweeps.measurer import Measurer
from ..sweeps.neuron_scores import neuron_scores
from ..sweeps.results import sequence_table as by_model
from ..sweeps.row_progress import StopRule
from .inference_stages import stage_table
from .prediction_neurons import neurons_per_block
from .signal_tables import SignalTables

NEURONS, SCORES, STAGES, BOUNDARIES = "neurons", "neuron_scores", "stages", "boundaries"
OnNeurons = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TableOutput:
    """Output of a run that ends in tables of its own.

    Attributes:
        measurer: the measurer.
        name: name of the model.
        make: makes the tables, by their names; the main table is first.
        rule: the rule by which rows stopped; None if all text was measured.
    """

    measurer: Measurer
    name: str
    make: Callable[[SignalTables], dict[str, pd.DataFrame]]
    rule: StopRule | None = None

    def table(self, sums: SequenceSums) -> pd.DataFrame:
        """Return the main table of what is measured so far."""
        return next(iter(self.make(SignalTables(self.measurer, sums, self.name, self.rule)).values()))

    def write(self, directory: Path, sums: SequenceSums) -> tuple[pd.DataFrame, list[str]]:
        """Write all tables; return the main one and the names of the files."""
        tables = SignalTables(self.measurer, sums, self.name, self.rule)
        frames = self.make(tables)
        files = write_tables(directory, frames)
        self.measurer.skipped.update(tables.skipped)
        rows = (
            sums_table(tables) if self.measurer.observer else by_model(self.measurer.variants, tables.sums_by_sequence)
        )
        with atomic_file(directory / SEQUENCES) as partial:
            pq.write_table(rows, partial, compression="zstd")
        return next(iter(frames.values())), [*files, SEQUENCES]


@dataclass(frozen=True, slots=True)
class AnalysisOutput:
    """Output of one analysis, or of all of them for the stages.

    Attributes:
        analysis: one of `registry.ANALYSES` that has signals.
        measurer: the measurer.
        name: name of the model.
        on_neurons: called after the neurons of each block with the number of blocks done and the total.
    """

    analysis: str
    measurer: Measurer
    name: str
    on_neurons: OnNeurons | None = None

    def table(self, sums: SequenceSums) -> pd.DataFrame:
        """Return the table of what is measured so far."""
        return self._tables(sums).table(ANALYSES[self.analysis].signals[0])

    def write(self, directory: Path, sums: SequenceSums) -> tuple[pd.DataFrame, list[str]]:
        """Write all tables; return the main one and the names of the files."""
        tables = self._tables(sums)
        frames = {signal: tables.table(signal) for signal in ANALYSES[self.analysis].signals}
        if self.analysis == STAGES:
            scores = self._neuron_scores(directory)
            frames |= {} if scores is None else {SCORES: scores, NEURONS: neurons_per_block(scores, self.name)}
            stages = stage_table(tables, frames.get(NEURONS))
            frames = {STAGES: stages, BOUNDARIES: boundary_table(stages), **frames}
        self.measurer.skipped.update(tables.skipped)
        files = write_tables(directory, frames)
        with atomic_file(directory / SEQUENCES) as partial:
            pq.write_table(sums_table(tables), partial, compression="zstd")
        return next(iter(frames.values())), [*files, SEQUENCES]

    def _tables(self, sums_by_sequence: SequenceSums) -> SignalTables:
        return SignalTables(self.measurer, sums_by_sequence, self.name)

    def _neuron_scores(self, directory: Path) -> pd.DataFrame | None:
        """Return the scores of all neurons; None if the model has none."""
        try:
            scores = self._load_or_score_neurons(directory)
        except UnsupportedEditError as error:
            self.measurer.skipped["neurons"] = str(error)
            return None
        self.measurer.skipped.update(scores.attrs["skipped"])
        return scores

    def _load_or_score_neurons(self, directory: Path) -> pd.DataFrame:
        """Return the scores of all neurons, from the file of an earlier start if it is there."""
        saved = directory / PARTS / f"{SCORES}.parquet"
        if saved.exists():
            try:
                return _read_scores(saved)
            except (OSError, pa.ArrowInvalid, KeyError):
                saved.unlink()
        runner = self.measurer.runner
        scores = neuron_scores(self.measurer.model, anatomy=runner.anatomy, progress=self.on_neurons)
        saved.parent.mkdir(exist_ok=True)
        with atomic_file(saved) as partial:
            table = pa.Table.from_pandas(scores, preserve_index=False)
            pq.write_table(
                table.replace_schema_metadata(
                    {**(table.schema.metadata or {}), b"attrs": json.dumps(scores.attrs).encode()}
                ),
                partial,
            )
        return scores


def boundary_table(stages: pd.DataFrame) -> pd.DataFrame:
    """Return the boundaries between stages as a table."""
    return pd.DataFrame(stages.attrs["boundaries"]).astype(dict.fromkeys(("layer", "low", "high"), "Int64"))


def _read_scores(path: Path) -> pd.DataFrame:
    table = pq.read_table(path)
    scores = table.to_pandas()
    scores.attrs.update(json.loads(table.schema.metadata[b"attrs"]))
    return scores


def sums_table(tables: SignalTables) -> pa.Table:
    """Return sums and counts by sequence, a row for each sequence and each quantity that was measured on it.

    All means and standard errors can be computed from them again.
    """
    sums_by_sequence, measurer = tables.sums_by_sequence, tables.measurer
    sequences = len(sums_by_sequence.counts)
    columns: list[tuple[str, int | None, str, str, np.ndarray, np.ndarray, np.ndarray]] = []
    everything = np.ones(sequences, bool)
    for row, variant in enumerate(measurer.variants):
        if len(measurer.variants) > 1:
            for index, metric in enumerate(METRICS):
                columns.append(
                    (
                        variant.edit,
                        variant.layer,
                        "",
                        metric,
                        sums_by_sequence.values[:, row, index],
                        sums_by_sequence.counts,
                        everything if sums_by_sequence.used is None else sums_by_sequence.used[:, row],
                    )
                )
    for quantity in measurer.observer.quantities if measurer.observer is not None else ():
        sums, counts = tables.sums(quantity.layer, quantity.part, quantity.name)
        columns.append((quantity.signal, quantity.layer, quantity.part, quantity.name, sums, counts, everything))
    numbers = pa.array(np.repeat(np.arange(len(columns)), sequences))
    signal, layer, part, name = (pa.array([column[index] for column in columns]) for index in range(4))
    return pa.table(
        {
            "sequence": pa.array(np.tile(sums_by_sequence.numbers, len(columns)), pa.int32()),
            "signal": signal.dictionary_encode().take(numbers),
            "layer": layer.cast(pa.int32()).take(numbers),
            "part": part.dictionary_encode().take(numbers),
            "name": name.dictionary_encode().take(numbers),
            "sum": pa.array(np.concatenate([column[4] for column in columns]), pa.float64()),
            "count": pa.array(np.concatenate([column[5] for column in columns]).astype("int64"), pa.int64()),
        }
    ).filter(pa.array(np.concatenate([column[6] for column in columns])))
