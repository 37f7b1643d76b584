"""Carrying out a run: batch after batch, each on the disk when it is done, and the results at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from ..errors import MeasurementError, OutputError
from ..plans.variants import Variant
from ..runtime.offload import device_of
from ..sweeps.executor import OnFraction
from ..sweeps.measurer import Measurer
from ..sweeps.results import results_table, sequence_table
from .distributed import ProcessGroup, SingleProcess, chunked
from .journal import Journal, Record
from .per_token import PARTS, TOKENS, TokenRows, is_complete, join_parts
from .run_directory import JOURNAL, Run, clear_progress
from .tables import CSV, RESULTS, SEQUENCES, write_sweep
from .text import TokenizedText

Draw = Callable[[pd.DataFrame, Path], Sequence[Path]]
OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        sequences: measured so far, those of an earlier start included; a share of one is one that is under way.
        of: in all.
        table: gives the results so far; None within a batch.
    """

    sequences: float
    total: int
    table: Callable[[], pd.DataFrame] | None = None


class RunOutput(Protocol):
    """What becomes of the sums."""

    def table(self, journal: Journal) -> pd.DataFrame:
        """Results so far, as far as a bar shows them."""

    def write(self, directory: Path, journal: Journal) -> tuple[pd.DataFrame, list[str]]:
        """Write all results; returns the first table, and the files' names."""


@dataclass(frozen=True, slots=True)
class SweepOutput:
    """The results of a sweep.

    Attributes:
        variants: the models, the unedited one first.
        name: of the model.
    """

    variants: Sequence[Variant]
    name: str

    def table(self, journal: Journal) -> pd.DataFrame:
        """A row for each model."""
        return results_table(self.variants, journal.sums(), self.name)

    def write(self, directory: Path, journal: Journal) -> tuple[pd.DataFrame, list[str]]:
        """The table, and the sums of each sequence."""
        frame = self.table(journal)
        write_sweep(directory, frame, sequence_table(self.variants, journal.sums()))
        return frame, [RESULTS, CSV, SEQUENCES]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What all processes of a run need to know: sequences of a batch, and the numbers of the batches to measure."""

    size: int
    missing: list[int]


@dataclass(frozen=True, slots=True)
class _MeasuredBatch:
    """A batch that one process has measured, or why it has not; and how many sequences its memory held at once, where that was asked."""

    batch: int
    record: Record | None
    max_sequences: int | None = None
    rows: TokenRows | None = None
    error: str = ""


def run_measurement(
    run: Run,
    measurer: Measurer,
    text: TokenizedText,
    output: RunOutput,
    *,
    batch_size: int | None = None,
    per_token: bool = False,
    tokenizer: Any = None,
    draw: Draw | None = None,
    on_progress: OnProgress | None = None,
    group: ProcessGroup | None = None,
) -> pd.DataFrame:
    """Measure what is still missing, and write the results.

    Args:
        run: the directory.
        measurer: the model and its variants.
        text: the tokens.
        outcome: makes results of what is measured.
        batch_size: sequences at once; by the free memory if not given.
        per_token: write `tokens.parquet` as well, a row for each token and model.
        tokenizer: to write its tokens as text.
        draw: draws figures from the results into the directory, and returns their paths.
        on_progress: is called at the beginning, now and then, and after each batch.
        group: the processes that measure together; this one leads, and the others `help_along`.

    Returns:
        The table of results.

    Raises:
        MeasurementError: the unedited model's predictions are no numbers, memory does not suffice, or another process has gone.
        OutputError: the directory cannot be written; what was measured stays.
    """
    group = group or SingleProcess()
    work = _Work(run, measurer, text, output, batch_size, per_token, on_progress)
    missing = work.missing()
    group.broadcast(Assignment(work.size, missing))
    work.tell(work.measured())
    for together in chunked(missing, group.size):
        before, of_round = work.measured(), sum(map(work.sequences, together))

        def tick(share: float, before: int = before, of_round: int = of_round) -> None:
            work.tell(before + share * of_round)

        done = group.gather(_measured(measurer, text, together[0], work.size, per_token, tokenizer, tick))
        faults = [one.error for one in done if one is not None and one.error]
        stop = True
        try:
            for one in done:
                work.take(one)
            stop = bool(faults)
        finally:
            group.broadcast(stop)
        if stop:
            raise MeasurementError(faults[0])
    return work.finish(draw)


def run_worker(
    measurer: Measurer, text: TokenizedText, *, per_token: bool = False, tokenizer: Any = None, group: ProcessGroup
) -> bool:
    """Measure this process's share of a run that another one leads; arguments as for `perform`.

    Returns:
        Whether it came to its end; the leader says what went wrong.

    Raises:
        MeasurementError: another process has gone.
    """
    job: Assignment = group.broadcast(Assignment(0, []))
    for together in chunked(job.missing, group.size):
        mine = together[group.rank] if group.rank < len(together) else None
        group.gather(None if mine is None else _measured(measurer, text, mine, job.size, per_token, tokenizer, None))
        if group.broadcast(False):
            return False
    return True


def _measured(
    measurer: Measurer,
    text: TokenizedText,
    batch: int,
    size: int,
    per_token: bool,
    tokenizer: Any,
    tick: OnFraction | None,
) -> _MeasuredBatch | None:
    begun = time.perf_counter()
    first = batch * size
    ids, mask = text.ids[first : first + size], text.mask[first : first + size]
    rows = TokenRows(measurer.variants, ids, mask, first, tokenizer) if per_token else None
    try:
        measured = measurer.measure(ids, mask, rows, tick)
    except MeasurementError as error:
        return _MeasuredBatch(batch, None, error=f"batch {batch}: {error}")
    record = Record(first, measured.counts, measured.values, measured.observed, time.perf_counter() - begun)
    return _MeasuredBatch(batch, record, measurer.max_sequences, rows if any(measured.counts) else None)


class _Work:
    """A run on the disk, as its leader sees it."""

    def __init__(
        self, run: Run, measurer: Measurer, text: TokenizedText, outcome: RunOutput, batch_size: int | None, per_token: bool, on_progress: OnProgress | None
    ) -> None:  # fmt: skip
        self.run, self.measurer, self.text, self.outcome = run, measurer, text, outcome
        self.per_token, self.on_progress = per_token, on_progress
        observer = measurer.observer
        run.start()
        self.journal = Journal(
            run.directory / JOURNAL, len(measurer.variants), 0 if observer is None else observer.size
        )
        known: int | None = run.facts.get("batch_size")
        self.size = known or min(len(text.ids), batch_size or measurer.suggest(text.ids.shape[1]))
        if known is None:
            run.update(batch_size=self.size)
        self.batches = -(-len(text.ids) // self.size)
        self.done: set[int] = set()
        self.at_once = self.size
        self.parts = run.directory / PARTS
        if per_token:
            try:
                self.parts.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make {self.parts}: {error.strerror or error}") from error

    def table(self) -> pd.DataFrame:
        return self.outcome.table(self.journal)

    def tell(self, sequences: float, *, table: bool = False) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(sequences, len(self.text.ids), self.table if table else None))

    def part(self, batch: int) -> Path:
        return self.parts / f"{batch:06}.parquet"

    def missing(self) -> list[int]:
        """Batches that are not measured, or whose tokens' rows are not there, if they are wanted and it has any."""
        for batch, record in self.journal.records.items():
            if not self.per_token or not any(record.counts) or is_complete(self.part(batch)):
                self.done.add(batch)
        return [batch for batch in range(self.batches) if batch not in self.done]

    def sequences(self, batch: int) -> int:
        """Of a batch; the last one may have fewer."""
        return min(self.size, len(self.text.ids) - batch * self.size)

    def measured(self) -> int:
        """Sequences that are measured."""
        return sum(map(self.sequences, self.done))

    def take(self, done: _MeasuredBatch | None) -> None:
        """Note a batch."""
        if done is None or done.record is None:
            return
        if done.rows is not None:
            done.rows.write(self.part(done.batch))
        self.at_once = min(self.at_once, done.max_sequences or self.size)
        self.journal.append(done.batch, done.record)
        self.done.add(done.batch)
        self.tell(self.measured(), table=True)

    def finish(self, draw: Draw | None) -> pd.DataFrame:
        """Write the results, then say that they are there, then clear up; in this order, so that a kill loses nothing."""
        frame, files = self.outcome.write(self.run.directory, self.journal)
        if self.per_token:
            parts = [self.part(batch) for batch in range(self.batches)]
            join_parts([part for part in parts if part.exists()], self.run.directory / TOKENS)
            files.append(TOKENS)
        self.run.update(files=files, **self._facts())
        drawn, fault = draw_safely(draw, frame, self.run.directory)
        self.run.update(state="finished", figures=drawn, figure_error=fault)
        clear_progress(self.run.directory)
        return frame

    def _broken(self) -> dict[str, list[int]]:
        """What gave values that are no numbers, and in which batches."""
        found = {self.measurer.variants[row].plan: batches for row, batches in self.journal.non_finite().items()}
        if self.measurer.observer is not None:
            names = self.measurer.observer.names
            found |= {names[number]: batches for number, batches in self.journal.non_finite_observed().items()}
        return found

    def _facts(self) -> dict[str, Any]:
        text, measurer, seconds = self.text, self.measurer, self.journal.seconds
        sequences, length = text.ids.shape
        parameters = list(measurer.model.parameters())
        device = device_of(measurer.model)
        return {
            "model": {
                "class": type(measurer.model).__name__,
                "blocks": measurer.runner.depth,
                "parameters": measurer.parameters,
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            "text": {
                "fingerprint": text.fingerprint, "tokens": text.tokens, "sequences": sequences, "length": length, "notes": text.notes,
            },
            "schedule": {
                "order": measurer.schedule.name,
                "block_calls": measurer.schedule.calls,
                "block_calls_apart": measurer.schedule.calls_without_sharing,
                "bytes_read_a_batch": measurer.bytes_to_read,
            },
            "sequences_at_once": self.at_once,
            "readout": measurer.readout.description,
            "compiled": _compiled(measurer),
            "skipped": measurer.skipped | ({} if measurer.observer is None else measurer.observer.skipped),
            "centred": None if measurer.observer is None else measurer.observer.reads_are_mean_free,
            "non_finite": self._broken(),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(text.tokens / max(seconds, 1e-9), 3),
            "machine": {
                "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
            },
        }  # fmt: skip


def _compiled(measurer: Measurer) -> bool | str:
    """Whether blocks were compiled, or why not."""
    compiler = measurer.runner.compiler
    return False if compiler is None else compiler.refused or True


def draw_safely(draw: Draw | None, frame: pd.DataFrame, directory: Path) -> tuple[list[str], str]:
    """Names of the figures, or why there are none: a picture that fails must not cost the numbers."""
    try:
        return ([] if draw is None else [path.name for path in draw(frame, directory)]), ""
    except OutputError:
        raise
    except Exception as error:  # matplotlib may raise anything
        return [], f"{type(error).__name__}: {error}"
