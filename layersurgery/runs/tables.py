"""Write the tables of a run, and read the results of a finished run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..atomic_io import atomic_file
from ..errors import SourceError
from ..path_names import without_directories
from ..registry import ANALYSES, PROPAGATION
from .run_record import RunRecord

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from .frames import ResultFrame

RESULTS = "results.parquet"
CSV = "results.csv"
SEQUENCES = "sequences.parquet"
REQUESTS = "requests.parquet"
MEANS = "means.safetensors"
RUN = "run.json"
TASKS = "tasks"
"""Directory of the tasks that a sweep measures after its text, inside the sweep's own."""
PARQUET_ONLY = ("neuron_scores",)
"""Tables with a row for each neuron: too large for CSV, figures and pages."""
TABLES = (*dict.fromkeys(table for analysis in ANALYSES.values() for table in analysis.tables), "step", "level")
"""Names of the tables of analyses. Their figures have the same names."""
_IN_ATTRS = {"stages": "boundaries", "rank": "spans", "results": PROPAGATION}
"""Tables that are read together with another table, into its `attrs`."""
_OTHER_TABLES = ("boundaries", "sequences", "tokens", "requests")


def write_sweep(directory: Path, frame: pd.DataFrame, sequences: pa.Table) -> None:
    """Write the results of a sweep. Each file is written completely or not at all.

    Args:
        directory: the directory to write to.
        frame: the table of `results_table`.
        sequences: the table of `sequence_table`.
    """
    write_parquet(directory / SEQUENCES, sequences)
    write_table(directory, Path(RESULTS).stem, frame)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a large table, compressed; the file is written completely or not at all."""
    import pyarrow.parquet as pq

    with atomic_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def write_table(directory: Path, name: str, frame: pd.DataFrame, *, csv: bool = True) -> list[str]:
    """Write one table as parquet, and as csv if wanted; return the files' names.

    Each file is written completely or not at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if csv:
        with atomic_file(directory / f"{name}.csv") as partial:
            frame.to_csv(partial, index=False)
    with atomic_file(directory / f"{name}.parquet") as partial:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)
    return [f"{name}.parquet", *([f"{name}.csv"] if csv else [])]


def write_tables(directory: Path, frames: dict[str, pd.DataFrame]) -> list[str]:
    """Write tables as Parquet and CSV, each file atomically; return the names of the files."""
    files = []
    for name, frame in frames.items():
        without_attrs = frame.copy()
        without_attrs.attrs.clear()
        files += write_table(directory, name, without_attrs, csv=name not in PARQUET_ONLY)
    return files


def read_results(directory: str | os.PathLike[str], table: str | None = None) -> ResultFrame:
    """Read a table of a finished sweep or analysis; `frame.attrs["run"]` holds the content of its `run.json`.

    Args:
        directory: the output directory of the run.
        table: name of the table ("lens", "attention", ...); by default the run's first table. The table "stages" has
            the boundaries between stages in `frame.attrs["boundaries"]`. "sequences" has the sums of each sequence, and
            "tokens" has every metric of every token, and "propagation" the changes of later blocks, if the run wrote
            them.

    Returns:
        The table: a pandas DataFrame, with figures: `frame.plot()`.

    Raises:
        SourceError: the directory contains no results or no such table, or the run has not finished.

    Example:
        >>> import layersurgery as ls
        >>> ls.read_results("nowhere")
        Traceback (most recent call last):
        ...
        layersurgery.errors.SourceError: nowhere contains no results: ...
    """
    from .frames import as_result

    path = Path(directory)
    run = read_run(path)
    if run is None or not str(run.get("kind")).startswith("layersurgery "):
        raise SourceError(
            f"{path} contains no results: give a directory that `layersurgery sweep`, `analyze` or `stages` wrote"
        )
    if run.get("state") != "finished":
        raise SourceError(f"the run in {path} has not finished; run the same command again to resume")
    tables = table_names(run)
    name = tables[0] if table is None else table
    files = [Path(file) for file in run.get("files", [])]
    others = {file.stem: file for file in files if file.suffix == ".parquet" and file.stem in _OTHER_TABLES}
    if name not in (*tables, *others):
        raise SourceError(f"{path} contains no table {name!r}; it contains {', '.join((*tables, *others))}")
    directory = path / others[name].parent if name in others else path
    frame = as_result(read_table(directory, name), "sweep" if name == Path(RESULTS).stem else name, caption_of(run))
    frame.attrs["run"] = run
    return frame


def read_table(directory: Path, name: str) -> pd.DataFrame:
    """Read one table of a directory.

    "stages" has the boundaries between stages in `frame.attrs["boundaries"]`, "rank" the spans of blocks in
    `frame.attrs["spans"]`, and "results" the changes of later blocks, if they were measured, in
    `frame.attrs["propagation"]`.

    Raises:
        SourceError: the table cannot be read.
    """
    frame = _read_parquet(directory, name)
    frame = frame.astype({"layer": "Int64"}) if "layer" in frame else frame
    other = _IN_ATTRS.get(name)
    if other is not None and (other == "boundaries" or (directory / f"{other}.parquet").exists()):
        from ..sweeps.propagation_results import Rows

        frame.attrs[other] = Rows(as_records(_read_parquet(directory, other)))
    return frame


def as_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows as dictionaries of plain values, None for a missing one.

    pandas can compare, copy and store these in `frame.attrs`; a table there breaks `concat`, `merge` and `to_parquet`.
    """
    import pandas as pd

    return [
        {str(name): None if pd.isna(value) else value for name, value in record.items()}
        for record in frame.to_dict("records")
    ]


def _read_parquet(directory: Path, name: str) -> pd.DataFrame:
    import pandas as pd

    path = directory / f"{name}.parquet"
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def caption_of(run: RunRecord) -> str:
    """Describe the text that a finished run measured on."""
    if "text" not in run:
        return str(run.get("caption", "from weights alone"))
    sequences = run["text"]["sequences"]
    up_to = "" if run.get("stopping") is None else "up to "
    source = run["arguments"].get("text", {}).get("data", "the text")
    noun = noun_of(run)
    caption = text_caption(run["text"]["tokens"], source, f"{sequences:,} {noun}{'s'[: sequences != 1]}")
    tasks = f" and {', '.join(run['arguments']['tasks'])}" if has_tasks_inside(run) else ""
    return f"{up_to}{caption}{tasks}"


def text_caption(tokens: int, source: str, count: str) -> str:
    """Describe a text in a few words, files by their names; `count` says how many sequences it has."""
    return f"{tokens:,} tokens of {without_directories(source)} in {count}"


def noun_of(run: Mapping[str, Any]) -> str:
    """Return what a sequence of a run's text is, as `TokenizedText.noun`."""
    return "request" if "tasks" in run.get("arguments", {}) and not has_tasks_inside(run) else "sequence"


def table_names(run: RunRecord) -> list[str]:
    """Return the names of the tables that a finished run wrote, the main one first.

    The boundaries are not listed, because they are read together with the stages.
    """
    files = [str(name) for name in run.get("files") or [RESULTS]]
    names = [Path(name).stem for name in files if name.endswith(".parquet")]
    return [name for name in names if name not in _OTHER_TABLES]


def has_tasks_inside(run: Mapping[str, Any]) -> bool:
    """Return whether a run measures tasks after its text, in a directory inside its own."""
    return "requests" in run.get("arguments", {}) or TASKS in run.get("replaced", [])


def read_run(directory: Path) -> RunRecord | None:
    """Read the `run.json` of a directory; return None if there is none.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        run = json.loads((directory / RUN).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {directory / RUN}: {error}. If a sweep wrote it, remove the directory and start again"
        ) from error
    if not isinstance(run, dict):
        raise SourceError(f"{directory / RUN} is not a JSON object with facts about a run")
    return cast(RunRecord, run)
