"""Run a measurement batch by batch, store each batch on the disk at once, and write the results at the end."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from ..errors import MeasurementError, OutputError
from ..metrics.aggregation import BatchResult, SequenceSums
from ..plans.variants import Variant
from ..registry import PROPAGATION
from ..runtime.inputs import has_next_token
from ..runtime.offload import device_of
from ..sweeps.batches import Batches
from ..sweeps.measurer import Measurer
from ..sweeps.precision import Precision
from ..sweeps.propagation import Propagation
from ..sweeps.propagation_results import propagation_rows, propagation_table
from ..sweeps.results import results_table, sequence_table, with_layer_kinds
from ..sweeps.row_progress import BatchRows, RowProgress, StopRule
from ..tasks.harness import Harness
from ..tasks.task_precision import TaskRule
from ..tasks.task_tables import request_table, task_columns
from .distributed import ProcessGroup, SingleProcess
from .journal import Journal
from .per_token import PARTS, TOKENS, is_complete, join_parts, write_batch
from .run_directory import JOURNAL, Run
from .run_record import RunRecord, StoppingFacts
from .tables import CSV, MEANS, REQUESTS, RESULTS, SEQUENCES, write_parquet, write_sweep, write_table
from .text import TokenizedText

if TYPE_CHECKING:
    import pandas as pd

    from .tasks_beside import TasksBeside

Draw: TypeAlias = "Callable[[pd.DataFrame, Path], Sequence[Path]]"
OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run.

    Attributes:
        sequences: number of sequences measured so far, including those of an interrupted run; fractional within a
            batch.
        total: number of all sequences.
        table: returns the results so far; None within a batch.
        precision: the precision at which edits are finished; None if there is none.
        stops: whether the run may end before the end of the text.
    """

    sequences: float
    total: int
    table: Callable[[], pd.DataFrame] | None = None
    precision: Precision | None = None
    stops: bool = False


class RunOutput(Protocol):
    """Output of a run: makes tables of the measured sums."""

    def table(self, sums: SequenceSums) -> pd.DataFrame:
        """Return the part of the results so far that a progress bar shows."""

    def write(self, directory: Path, sums: SequenceSums) -> tuple[pd.DataFrame, list[str]]:
        """Write all results; return the first table, and the names of the written files."""


@dataclass(frozen=True, slots=True)
class SweepOutput:
    """Output of a sweep.

    Attributes:
        variants: the models, the unedited one first.
        name: the model's name.
        precision: the precision at which an edit is finished; None if all text is measured.
        propagation: the measured changes of later blocks; None if they are not measured.
        harness: the tasks that are measured; None if a text is.
        kinds: the kind of each layer of the model; empty if all are of one kind.
        beside: the tasks to measure after the text, whose metrics join the table; None for none.
        task_rule: the rule by which an edit needs no more documents; None if all are measured.
    """

    variants: Sequence[Variant]
    name: str
    precision: Precision | None = None
    propagation: Propagation | None = None
    harness: Harness | None = None
    kinds: Sequence[str] = ()
    beside: TasksBeside | None = None
    task_rule: TaskRule | None = None

    def table(self, sums: SequenceSums) -> pd.DataFrame:
        """Return a table with a row for each model, without the tasks' metrics."""
        precision = self.precision if self.task_rule is None else self.task_rule.precision
        return with_layer_kinds(results_table(self.variants, sums, self.name, precision), self.kinds)

    def table_with_tasks(self, sums: SequenceSums) -> pd.DataFrame:
        """Return the table at the end of the run, with the tasks' metrics."""
        frame = self.table(sums)
        if self.harness is None:
            return frame
        return frame.drop(columns="precise", errors="ignore").join(task_columns(self.harness, sums, self.task_rule))

    def write(self, directory: Path, sums: SequenceSums) -> tuple[pd.DataFrame, list[str]]:
        """Write the table of results and the sums of each sequence; return the table and the names of the files."""
        frame = self.table_with_tasks(sums)
        if self.beside is not None:
            frame = self.beside.join(frame)
        write_sweep(directory, frame, sequence_table(self.variants, sums))
        files = [RESULTS, CSV, SEQUENCES, *([MEANS] if (directory / MEANS).exists() else [])]
        if self.propagation is not None:
            rows = propagation_rows(self.variants, self.propagation, sums, self.name)
            files += write_table(directory, PROPAGATION, propagation_table(rows))
            frame.attrs[PROPAGATION] = rows
        if self.harness is not None:
            names = [variant.name for variant in self.variants]
            write_parquet(directory / REQUESTS, request_table(self.harness, sums, names))
            files.append(REQUESTS)
        return frame, files if self.beside is None else [*files, *self.beside.files]


def measure_text(
    run: Run,
    measurer: Measurer,
    text: TokenizedText,
    output: RunOutput,
    *,
    batch_size: int | None = None,
    per_token: bool = False,
    tokenizer: Any = None,
    on_progress: OnProgress | None = None,
    group: ProcessGroup | None = None,
    rule: StopRule | None = None,
) -> Callable[[Draw | None], pd.DataFrame]:
    """Measure the batches that are still missing.

    Args:
        run: the output directory.
        measurer: the model and its variants.
        text: the tokens.
        output: makes tables of the measured sums.
        batch_size: number of sequences in a batch; by default chosen from the free memory.
        per_token: also write `tokens.parquet`, with a row for each token and model.
        tokenizer: writes the tokens in `tokens.parquet` as text.
        on_progress: called at the beginning, from time to time, and after each batch.
        group: the processes that measure together; this one leads, and the others call `run_worker`.
        rule: says after each batch which rows need no more text; None to measure every row on all text.

    Returns:
        A function that writes the results, draws figures with the function that it is given, and returns the table. By
        then, the other processes wait for the next work.

    Raises:
        MeasurementError: the unedited model returns NaN or infinite logits, memory is too small, or another process has
            ended.
        OutputError: the directory cannot be written. The measured batches are kept.
    """
    group = group or SingleProcess()
    work = _Work(run, measurer, text, output, batch_size, per_token, tokenizer, on_progress, rule)
    group.broadcast(work.batches)
    work.report_progress(work.measured())
    while batches := group.broadcast(work.next(group.size)):
        results = _measure_round(measurer, text, work.batches, batches, group, per_token, work.on_fraction(batches))
        errors = [result for result in results if isinstance(result, str)]
        try:
            for (batch, _), result in zip(batches, results, strict=False):  # the last round may have fewer batches
                if isinstance(result, BatchResult):
                    work.store(batch, result)
            if errors:
                raise MeasurementError(errors[0])
            work.report_progress(work.measured(), table=True)
        except BaseException:
            group.broadcast(None)
            raise
    group.workers_idle = True
    return work.finish


def run_worker(measurer: Measurer, text: TokenizedText, *, per_token: bool = False, group: ProcessGroup) -> bool:
    """Measure this process's share of a run that another process leads; arguments as for `measure_text`.

    Returns:
        True if the run was completed; False if the leader stopped it. Then the leader raises the error.

    Raises:
        MeasurementError: another process has ended.
    """
    division = group.broadcast(Batches(()))
    nothing: list[BatchRows] | None = None
    while batches := group.broadcast(nothing):
        _measure_round(measurer, text, division, batches, group, per_token)
    return batches is not None


def _measure_round(
    measurer: Measurer,
    text: TokenizedText,
    division: Batches,
    batches: Sequence[BatchRows],
    group: ProcessGroup,
    per_token: bool,
    on_fraction: Callable[[float], None] | None = None,
) -> list[BatchResult | str | None]:
    """Measure one batch in each process.

    Args:
        measurer: the model and its variants.
        text: the tokens.
        division: which sequences each batch has.
        batches: the round's batches, by process; the last round may have fewer than processes.
        group: the processes.
        per_token: keep the metrics at each position.
        on_fraction: called from time to time with the fraction of this process's batch that is done.

    Returns:
        In the leader, by process: the result, the error message, or None where no batch was left.
    """
    result: BatchResult | str | None = None
    if group.rank < len(batches):
        batch, rows = batches[group.rank]
        try:
            result = measurer.measure_batch(
                text.ids, text.mask, division.span(batch), rows, per_token=per_token, on_fraction=on_fraction
            )
        except MeasurementError as error:
            result = f"batch {batch}: {error}"
    return group.gather(result)


class _Work:
    """Work of the leading process: finds missing batches, stores measured ones, and writes the results."""

    def __init__(
        self,
        run: Run,
        measurer: Measurer,
        text: TokenizedText,
        output: RunOutput,
        batch_size: int | None,
        per_token: bool,
        tokenizer: Any,
        on_progress: OnProgress | None,
        rule: StopRule | None,
    ) -> None:
        self.run, self.measurer, self.text, self.output = run, measurer, text, output
        self.per_token, self.tokenizer, self.on_progress = per_token, tokenizer, on_progress
        observer = measurer.block_observer
        run.start()
        self.journal = Journal(
            run.directory / JOURNAL,
            len(measurer.variants),
            0 if observer is None else observer.size,
            tails=measurer.tails,
        )
        # A resumed run keeps its batch size, because the journal stores whole batches.
        recorded_size: int | None = run.facts.get("batch_size")
        size = recorded_size or min(
            len(text.ids), batch_size or measurer.suggest(text.ids.shape[1], stops=rule is not None)
        )
        if recorded_size is None:
            run.update({"batch_size": size})
        self.batches = measurer.batches(text.ids, text.mask, size, fixed=batch_size is not None)
        self.max_sequences = max(map(self.sequences, range(len(self.batches))))
        self.parts = run.directory / PARTS
        if per_token:
            try:
                self.parts.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot create {self.parts}: {error.strerror or error}") from error
        self.rows = RowProgress(len(measurer.variants), len(self.batches), rule, self._usable())

    def table(self) -> pd.DataFrame:
        return self.output.table(self.rows.sums())

    def report_progress(self, sequences: float, *, table: bool = False) -> None:
        if self.on_progress is not None:
            rule = self.rows.rule
            precision = rule if isinstance(rule, Precision) else None
            total, made = len(self.text.ids), self.table if table else None
            self.on_progress(Progress(sequences, total, made, precision, rule is not None))

    def part_path(self, batch: int) -> Path:
        """Return the path of a batch's rows for each token."""
        return self.parts / f"{batch:06}.parquet"

    def _usable(self) -> dict[int, BatchResult]:
        """Return the batches that need not be measured again.

        They are the batches with a result and, if rows for each token are wanted, with their file of these.
        """
        return {
            batch: result
            for batch, result in self.journal.results.items()
            if not self.per_token or not any(result.counts) or is_complete(self.part_path(batch))
        }

    def next(self, most: int) -> list[BatchRows]:
        """Return the next batches to measure, `most` of them or fewer, each with its rows."""
        return self.rows.next(most)

    def on_fraction(self, batches: Sequence[BatchRows]) -> Callable[[float], None]:
        """Return a function that reports the fraction of these batches that is done."""
        numbers = {batch for batch, _ in batches}
        before, now = (sum(map(self.sequences, part)) for part in (self.rows.results.keys() - numbers, numbers))
        return lambda fraction: self.report_progress(before + fraction * now)

    def sequences(self, batch: int) -> int:
        """Return the number of sequences in a batch."""
        return self.batches.size(batch)

    def measured(self) -> int:
        """Return the number of measured sequences."""
        return sum(map(self.sequences, self.rows.results))

    def store(self, batch: int, result: BatchResult) -> None:
        """Store a measured batch on the disk."""
        if result.token_metrics:
            span = self.batches.span(batch)
            path, variants = self.part_path(batch), self.measurer.variants
            write_batch(path, variants, self.text.ids[span], self.text.mask[span], result, self.tokenizer)
        self.max_sequences = min(self.max_sequences, result.max_sequences or self.max_sequences)
        result = replace(result, token_metrics=None)
        if (contexts := self.measurer.contexts.outcome) not in (None, self.run.facts.get("contexts")):
            self.run.update({"contexts": contexts})  # a resumed run that has all batches could not know it
        self.journal.append(batch, result)
        self.rows.add(batch, result)

    def finish(self, draw: Draw | None) -> pd.DataFrame:
        """Write the results, then mark the run as finished, then remove temporary files.

        In this order, a run that is killed loses nothing.
        """
        frame, files = self.output.write(self.run.directory, self.rows.sums())
        if self.per_token:
            paths = [self.part_path(batch) for batch in range(len(self.batches))]
            join_parts([path for path in paths if path.exists()], self.run.directory / TOKENS)
            files.append(TOKENS)
        self.run.update({"files": files, **self._describe_run()})
        figures, error = draw_safely(draw, frame, self.run.directory)
        self.run.update({"state": "finished", "figures": figures, "figure_error": error})
        self.run.clear_progress()
        return frame

    def _find_non_finite(self) -> dict[str, list[int]]:
        """Return for each plan or quantity with NaN or infinite values the batches that have them."""
        batches_by_name = {
            self.measurer.variants[row].plan: batches for row, batches in self.journal.non_finite("values").items()
        }
        if self.measurer.block_observer is not None:
            names = self.measurer.block_observer.names
            observed = self.journal.non_finite("observed")
            batches_by_name |= {names[column]: batches for column, batches in observed.items()}
        return batches_by_name

    def _describe_stopping(self) -> StoppingFacts | None:
        """Return how much of the text was enough; None if all was measured."""
        if self.rows.rule is None:
            return None
        used = [(batch, rows) for batch in sorted(self.rows.results) if (rows := self.rows.rows_of(batch)) != (0,)]
        calls = [self.measurer.calls_for(rows) * sum(self.rows.results[batch].counts) for batch, rows in used]
        return {
            "finished": len(self.rows.finished),
            "edits": self.rows.rows - 1,
            "sequences": sum(self.sequences(batch) for batch, _ in used),
            "tokens": sum(sum(self.rows.results[batch].counts) for batch, _ in used),
            "block_call_tokens": sum(calls),
            "block_call_tokens_of_all_text": self.measurer.schedule.calls * int(has_next_token(self.text.mask).sum()),
        }

    def _describe_run(self) -> RunRecord:
        """Return the facts about the model, the text and the run for `run.json`."""
        text, measurer, seconds = self.text, self.measurer, self.journal.seconds
        observer = measurer.block_observer
        sequences, length = text.ids.shape
        parameters = list(measurer.model.parameters())
        stopping = self._describe_stopping()
        measured = text.tokens if stopping is None else stopping["tokens"]
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
                "fingerprint": text.fingerprint, "tokens": text.tokens, "sequences": sequences, "length": length,
                "notes": text.notes, "read": text.read,
            },
            "schedule": {
                "order": measurer.schedule.name,
                "block_calls": measurer.schedule.calls,
                "block_calls_apart": measurer.schedule.calls_without_sharing,
                "bytes_read_a_batch": measurer.bytes_to_read,
            },
            "stopping": stopping,
            "sequences_at_once": self.max_sequences,
            "readout": measurer.readout.description,
            "compiled": _compiled_or_reason(measurer),
            "contexts": measurer.contexts.outcome or self.run.facts.get("contexts"),
            "skipped": measurer.skipped | ({} if observer is None else observer.skipped),
            "centred": None if observer is None else observer.reads_are_mean_free,
            "non_finite": self._find_non_finite(),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(measured / max(seconds, 1e-9), 3),
            "machine": {
                "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
                "threads": torch.get_num_threads(),
            },
        }  # fmt: skip


def _compiled_or_reason(measurer: Measurer) -> bool | str:
    """Return whether blocks were compiled, or the reason why compiled blocks were refused."""
    compiler = measurer.runner.compiler
    return False if compiler is None else compiler.error or True


def draw_safely(draw: Draw | None, frame: pd.DataFrame, directory: Path) -> tuple[list[str], str]:
    """Draw figures; return their names and an error message, so that an error while drawing does not stop the run.

    Raises:
        OutputError: a figure cannot be written.
    """
    try:
        return ([] if draw is None else [path.name for path in draw(frame, directory)]), ""
    except OutputError:
        raise
    except Exception as error:  # matplotlib may raise any exception
        return [], f"{type(error).__name__}: {error}"
