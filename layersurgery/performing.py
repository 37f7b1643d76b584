"""Carrying out a run: batch after batch, each on the disk when it is done, and the results at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .errors import MeasurementError, OutputError
from .journal import Journal, Record
from .measuring import EachToken, Measurer, Tick
from .pertoken import PARTS, TOKENS, TokenRows, join, whole
from .runs import JOURNAL, Run, clear_progress
from .table import by_sequence, results, write
from .text import Text

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
    of: int
    table: Callable[[], pd.DataFrame] | None = None


def perform(
    run: Run,
    measurer: Measurer,
    text: Text,
    *,
    name: str,
    batch_size: int | None = None,
    per_token: bool = False,
    tokenizer: Any = None,
    draw: Draw | None = None,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """Measure what is still missing, and write the results.

    Args:
        run: the directory.
        measurer: the model and its variants.
        text: the tokens.
        name: the model's name, for the table.
        batch_size: sequences at once; found by trying if not given.
        per_token: write `tokens.parquet` as well, a row for each token and model.
        tokenizer: to write its tokens as text.
        draw: draws figures from the results into the directory, and returns their paths.
        on_progress: is called at the beginning, now and then, and after each batch.

    Returns:
        The table of results.

    Raises:
        MeasurementError: the unedited model's predictions are no numbers, or memory does not suffice.
        OutputError: the directory cannot be written; what was measured stays.
    """
    work = _Work(run, measurer, text, name, batch_size, per_token, tokenizer, on_progress)
    work.tell(sum(len(record.counts) for record in work.journal.records.values()))
    batch = 0
    while work.size is None or batch * work.size < len(text.ids):
        if not work.has(batch):
            work.do(batch)
        batch += 1
    return work.finish(batch, draw)


class _Work:
    def __init__(
        self, run: Run, measurer: Measurer, text: Text, name: str, batch_size: int | None, per_token: bool, tokenizer: Any,
        on_progress: OnProgress | None,
    ) -> None:  # fmt: skip
        self.run, self.measurer, self.text, self.name = run, measurer, text, name
        self.per_token, self.tokenizer, self.on_progress = per_token, tokenizer, on_progress
        run.begin()
        self.journal = Journal(run.directory / JOURNAL, len(measurer.variants))
        self.size: int | None = run.facts.get("batch_size") or batch_size
        self.parts = run.directory / PARTS
        if per_token:
            try:
                self.parts.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make {self.parts}: {error.strerror or error}") from error

    def table(self) -> pd.DataFrame:
        return results(self.measurer.variants, self.journal.sums(), self.name)

    def tell(self, sequences: float, *, table: bool = False) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(sequences, len(self.text.ids), self.table if table else None))

    def part(self, batch: int) -> Path:
        return self.parts / f"{batch:06}.parquet"

    def has(self, batch: int) -> bool:
        """Whether a batch is measured, and its tokens' rows are there, if they are wanted and it has any."""
        record = self.journal.records.get(batch)
        if self.size is None or record is None:
            return False
        return not self.per_token or not any(record.counts) or whole(self.part(batch))

    def do(self, batch: int) -> None:
        """Measure a batch, and note it."""
        begun = time.perf_counter()
        ids, mask = self.text.ids, self.text.mask
        first = batch * (self.size or 0)
        rows: TokenRows | None = None

        def each(taken: int) -> EachToken | None:
            nonlocal rows
            span = slice(first, first + taken)
            rows = TokenRows(self.measurer.variants, ids[span], mask[span], first, self.tokenizer) if self.per_token else None
            return rows

        def tick(taken: int) -> Tick | None:
            of_batch = min(taken, len(ids) - first)
            return lambda share: self.tell(first + share * of_batch)

        with _named(batch, self.size, self.run.directory):
            if self.size is None:
                start = min(len(ids), self.measurer.suggest(ids.shape[1]))
                self.size, measured = self.measurer.first(ids, mask, start, each, tick)
            else:
                span = slice(first, first + self.size)
                measured = self.measurer.measure(ids[span], mask[span], each(self.size), tick(self.size))
        if self.run.facts.get("batch_size") != self.size:
            self.run.note(batch_size=self.size)
        if rows is not None and any(measured.counts):
            rows.write(self.part(batch))
        self.journal.append(batch, Record(first, measured.counts, measured.values, time.perf_counter() - begun))
        self.tell(first + len(measured.counts), table=True)

    def finish(self, batches: int, draw: Draw | None) -> pd.DataFrame:
        """Write the results, then say that they are there, then clear up; in this order, so that a kill loses nothing."""
        frame = self.table()
        write(self.run.directory, frame, by_sequence(self.measurer.variants, self.journal.sums()))
        if self.per_token:
            parts = [self.part(batch) for batch in range(batches)]
            join([part for part in parts if part.exists()], self.run.directory / TOKENS)
        drawn, fault = _drawn(draw, frame, self.run.directory)
        self.run.note(state="finished", figures=drawn, figures_fault=fault, **self._facts())
        clear_progress(self.run.directory)
        return frame

    def _facts(self) -> dict[str, Any]:
        text, measurer, seconds = self.text, self.measurer, self.journal.seconds
        sequences, length = text.ids.shape
        parameters = list(measurer.model.parameters())
        device = parameters[0].device
        return {
            "model": {
                "class": type(measurer.model).__name__,
                "blocks": measurer.stack.depth,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            "text": {
                "fingerprint": text.fingerprint, "tokens": text.tokens, "sequences": sequences, "length": length, "notes": text.notes,
            },
            "schedule": {"block_calls": measurer.schedule.calls, "block_calls_apart": measurer.schedule.calls_apart},
            "readout": measurer.readout.about,
            "compiled": _compiled(measurer),
            "left_out": measurer.left_out,
            "not_numbers": {measurer.variants[row].plan: batches for row, batches in self.journal.broken().items()},
            "seconds": round(seconds, 3),
            "tokens_per_second": round(text.tokens / max(seconds, 1e-9), 3),
            "machine": {
                "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
            },
        }  # fmt: skip


def _compiled(measurer: Measurer) -> bool | str:
    """Whether blocks were compiled, or why not."""
    compiler = measurer.stack.compiler
    return False if compiler is None else compiler.refused or True


def _drawn(draw: Draw | None, frame: pd.DataFrame, directory: Path) -> tuple[list[str], str]:
    """Names of the figures, or why there are none: a picture that fails must not cost the numbers."""
    try:
        return ([] if draw is None else [path.name for path in draw(frame, directory)]), ""
    except OutputError:
        raise
    except Exception as error:  # matplotlib may raise anything
        return [], f"{type(error).__name__}: {error}"


@contextmanager
def _named(batch: int, size: int | None, directory: Path) -> Iterator[None]:
    """Say in which batch something went wrong."""
    try:
        yield
    except MeasurementError as error:
        raise MeasurementError(f"batch {batch}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            f"batch {batch}: memory ran out with {size} sequences at once. What was measured is in {directory}: free memory and give the same "
            "command again, or begin anew with a smaller --batch-size and --overwrite"
        ) from error
