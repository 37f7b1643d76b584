"""A sweep that leaves its results in a directory, and goes on where it was when it is stopped.

After each batch what was measured is on the disk. The same arguments, given again, go on with the first batch that is missing and end
with the same digits as an undisturbed run; other arguments are refused.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .atomic import locked, whole_file
from .errors import MeasurementError, OutputError
from .journal import Journal, Record
from .measuring import EachToken, Measurer, Tick
from .pertoken import PARTS, TOKENS, TokenRows, join
from .table import RESULTS, RUN, by_sequence, read_run, results
from .text import Text
from .version import __version__

JOURNAL = "progress.journal"
SEQUENCES = "sequences.parquet"
CSV = "results.csv"
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


@dataclass(slots=True)
class Run:
    """A directory that a sweep writes into, held by this process.

    Attributes:
        directory: where.
        arguments: everything that the digits depend on.
        facts: what `run.json` says.
    """

    directory: Path
    arguments: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether its results are there already."""
        return self.facts.get("state") == "finished"

    @property
    def begun(self) -> bool:
        """Whether an earlier start has left something to go on with."""
        return (self.directory / JOURNAL).exists()

    def note(self, **facts: Any) -> None:
        """Write facts to `run.json`."""
        self.facts |= facts
        with whole_file(self.directory / RUN) as partial:
            partial.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def open_run(directory: Path, arguments: dict[str, Any], *, overwrite: bool = False) -> Iterator[Run]:
    """Hold a directory for a sweep with these arguments: a new one, or one that such a sweep has begun or finished.

    Raises:
        OutputError: it holds something else, or a sweep with other arguments (says which), or another process writes to it.
    """
    arguments = json.loads(json.dumps(arguments))
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise OutputError(f"{directory} exists and is no directory; choose another output with -o")
    fresh = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {directory}: {error.strerror or error}") from error
    with locked(directory):
        run = _run_in(directory, arguments, overwrite)
        try:
            yield run
        except BaseException:
            if not run.finished and not run.begun:  # nothing was measured, so nothing is to be gone on with
                _clear(directory)
                if fresh:
                    with suppress(OSError):
                        directory.rmdir()
            raise


def _run_in(directory: Path, arguments: dict[str, Any], overwrite: bool) -> Run:
    before = read_run(directory)
    if before is None and any(directory.iterdir()):
        raise OutputError(f"{directory} holds something else than a sweep; choose another output with -o")
    run = Run(directory, arguments, before or {})
    if before is not None and (overwrite or not (run.finished or run.begun)):
        _clear(directory)
    elif before is not None:
        if changed := _changed(before.get("arguments", {}), arguments):
            raise OutputError(
                f"{directory} holds a sweep with other arguments: {changed}. Say --overwrite to start anew, or choose another output with -o"
            )
        return run
    run = Run(directory, arguments)
    run.note(state="begun", arguments=arguments)
    return run


def _clear(directory: Path) -> None:
    drawn = (read_run(directory) or {}).get("figures", [])
    for name in (*drawn, RESULTS, CSV, SEQUENCES, JOURNAL, TOKENS, RUN):
        (directory / Path(str(name)).name).unlink(missing_ok=True)
    shutil.rmtree(directory / PARTS, ignore_errors=True)


def _changed(before: Any, now: Any, where: str = "") -> str:
    """What differs, in words; empty where nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        found = [_changed(before.get(name), now.get(name), f"{where}{name} ") for name in names]
        return "; ".join(filter(None, found))
    if before == now:
        return ""
    if len(str(before)) + len(str(now)) > 120:
        return f"{where.strip()} differ"
    return f"{where}{_say(before)} there, {_say(now)} now"


def _say(value: Any) -> str:
    return "nothing" if value is None else str(value)


def versions() -> dict[str, str]:
    """Of what the digits depend on."""
    return {"layersurgery": __version__, **{name: version(name) for name in ("torch", "transformers")}}


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
    journal = Journal(run.directory / JOURNAL, len(measurer.variants))
    sequences, length = text.ids.shape
    parts = run.directory / PARTS
    if per_token:
        parts.mkdir(exist_ok=True)

    def table() -> pd.DataFrame:
        return results(measurer.variants, journal.sums(), name)

    def part(batch: int) -> Path:
        return parts / f"{batch:06}.parquet"

    size = run.facts.get("batch_size") or batch_size
    batch = 0
    if on_progress is not None:
        on_progress(Progress(sum(len(record.counts) for record in journal.records.values()), sequences))
    while size is None or batch * size < sequences:
        if (
            size is not None
            and batch in journal.records
            and (not per_token or part(batch).exists() or not any(journal.records[batch].counts))
        ):
            batch += 1
            continue
        begun = time.perf_counter()
        first = batch * (size or 0)
        rows: dict[int, TokenRows] = {}

        def each(taken: int, first: int = first, rows: dict[int, TokenRows] = rows) -> EachToken | None:
            if not per_token:
                return None
            span = slice(first, first + taken)
            rows[0] = TokenRows(measurer.variants, text.ids[span], text.mask[span], first, tokenizer)
            return rows[0]

        def tick(taken: int, first: int = first) -> Tick | None:
            of_batch = min(taken, sequences - first)
            return None if on_progress is None else lambda share: on_progress(Progress(first + share * of_batch, sequences))

        if size is None:
            size, measured = measurer.first(text.ids, text.mask, min(sequences, measurer.suggest(length)), each, tick)
        else:
            span = slice(first, first + size)
            with _memory(size, run.directory):
                measured = measurer.measure(text.ids[span], text.mask[span], each(size), tick(size))
        if run.facts.get("batch_size") != size:
            run.note(batch_size=size, block_calls=measured.calls)
        if per_token and any(measured.counts):
            rows[0].write(part(batch))
        journal.append(batch, Record(first, measured.counts, measured.values, time.perf_counter() - begun))
        batch += 1
        if on_progress is not None:
            on_progress(Progress(min(sequences, batch * size), sequences, table))
    frame = table()
    _write(run.directory, frame, by_sequence(measurer.variants, journal.sums()))
    if per_token:
        join([part(number) for number in range(batch) if part(number).exists()], run.directory / TOKENS)
    drawn = list(draw(frame, run.directory)) if draw is not None else []
    run.note(
        state="finished",
        model=_model_facts(measurer),
        text={
            "fingerprint": text.fingerprint,
            "tokens": text.tokens,
            "sequences": sequences,
            "length": length,
            "notes": text.notes,
        },
        schedule={"block_calls": measurer.schedule.calls, "block_calls_apart": measurer.schedule.calls_apart},
        readout=measurer.readout.about,
        left_out=measurer.left_out,
        not_numbers={measurer.variants[row].plan: batches for row, batches in journal.broken().items()},
        seconds=round(journal.seconds, 3),
        tokens_per_second=round(text.tokens / max(journal.seconds, 1e-9), 3),
        figures=[path.name for path in drawn],
        machine={
            "python": platform.python_version(),
            "system": platform.platform(terse=True),
            "threads": torch.get_num_threads(),
        },
    )
    (run.directory / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)
    return frame


@contextmanager
def _memory(size: int, directory: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            f"memory ran out with {size} sequences at once. What was measured is in {directory}: free memory and give the same command again, or "
            "begin anew with a smaller --batch-size and --overwrite"
        ) from error


def _model_facts(measurer: Measurer) -> dict[str, Any]:
    parameters = list(measurer.model.parameters())
    device = parameters[0].device
    return {
        "class": type(measurer.model).__name__,
        "blocks": measurer.stack.depth,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _write(directory: Path, frame: pd.DataFrame, sequences: pa.Table) -> None:
    with whole_file(directory / SEQUENCES) as partial:
        pq.write_table(sequences, partial, compression="zstd")
    with whole_file(directory / CSV) as partial:
        frame.to_csv(partial, index=False)
    with whole_file(directory / RESULTS) as partial:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)
