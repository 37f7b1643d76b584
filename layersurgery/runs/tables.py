"""Results as tables: what their columns are, how they are written, read back and summed up in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..atomic_io import atomic_file
from ..errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS = "results.parquet"
CSV = "results.csv"
SEQUENCES = "sequences.parquet"
RUN = "run.json"
TABLES = (
    "stages", "boundaries", "lens", "attention", "norms", "similarity", "drop", "neuron_scores", "neurons",
    "rank", "spans", "step", "costs", "subjoiners", "attention_to_words", "examples",
    "probe", "single_neurons", "top_k", "effects",
)  # fmt: skip
"""Of analyses; also their figures are called so."""


def write_sweep(directory: Path, frame: pd.DataFrame, sequences: pa.Table) -> None:
    """Write the results, each file whole or not at all.

    Args:
        directory: where.
        frame: what `results` gave.
        sequences: what `by_sequence` gave.
    """
    import pyarrow.parquet as pq

    with atomic_file(directory / SEQUENCES) as partial:
        pq.write_table(sequences, partial, compression="zstd")
    write_table(directory, Path(RESULTS).stem, frame)


def write_table(directory: Path, name: str, frame: pd.DataFrame, *, csv: bool = True) -> list[str]:
    """Write one table as parquet, and as csv if wanted, each file whole or not at all; returns the files' names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if csv:
        with atomic_file(directory / f"{name}.csv") as partial:
            frame.to_csv(partial, index=False)
    with atomic_file(directory / f"{name}.parquet") as partial:
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), partial)
    return [f"{name}.parquet", *([f"{name}.csv"] if csv else [])]


def read_results(directory: str | os.PathLike[str], table: str | None = None) -> pd.DataFrame:
    """The results of a finished sweep or analysis; `frame.attrs["run"]` says how they came about.

    Args:
        directory: the one that was written.
        table: which of its tables ("lens", "attention", ...); its first one if not given: a sweep's, an analysis's own, or "stages", whose
            `frame.attrs["boundaries"]` holds the limits between stages.

    Raises:
        SourceError: no results there, no such table, or a run that has not finished.

    Example:
        >>> frame = read_results("smollm2-135m-sweep")  # doctest: +SKIP
        >>> frame[frame.edit == "swap"].plot("layer", "kl_nats", logy=True)  # doctest: +SKIP
        >>> read_results("smollm2-135m-stages", "lens").lens_kl_nats  # doctest: +SKIP
    """
    place = Path(directory)
    run = read_run(place)
    if run is None or not str(run.get("kind")).startswith("layersurgery "):
        raise SourceError(
            f"{place} holds no results: give a directory that `layersurgery sweep`, `analyze` or `stages` wrote"
        )
    if run.get("state") != "finished":
        raise SourceError(f"the run in {place} has not finished; the same command, given again, goes on with it")
    tables = tables_in(run)
    name = tables[0] if table is None else table
    if name not in (*tables, *(["boundaries"] if "stages" in tables else [])):
        raise SourceError(f"{place} holds no table {name!r}; it holds {', '.join(tables)}")
    frame = read_table(place, name)
    frame.attrs["run"] = run
    return frame


def read_table(place: Path, name: str) -> pd.DataFrame:
    """One table of a directory; a table of stages with the limits between them as `frame.attrs["boundaries"]`.

    Raises:
        SourceError: it cannot be read.
    """
    frame = _read(place, name)
    frame = frame.astype({"layer": "Int64"}) if "layer" in frame else frame
    if name == "stages":
        limits = _read(place, "boundaries")
        frame.attrs["boundaries"] = [
            {key: _plain(value, whole=key in ("layer", "low", "high")) for key, value in record.items()}
            for record in limits.to_dict("records")
        ]
    return frame


def _plain(value: Any, *, whole: bool) -> Any:
    """A cell as a plain value, None where there is none."""
    if pd.isna(value):
        return None
    return int(value) if whole else value


def _read(place: Path, name: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(place / f"{name}.parquet")
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {place / f'{name}.parquet'}: {getattr(error, 'strerror', None) or error}"
        ) from error


def tables_in(run: dict[str, Any]) -> list[str]:
    """Names of the tables that a finished run has written, the first one first; limits of stages go with the stages."""
    files = [str(name) for name in run.get("files") or [RESULTS]]
    names = [name.removesuffix(".parquet") for name in files if name.endswith(".parquet")]
    return [name for name in names if name not in ("sequences", "tokens", "boundaries")]


def read_run(directory: Path) -> dict[str, Any] | None:
    """What `run.json` says; None where there is none.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        run = json.loads((directory / RUN).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {directory / RUN}: {error}. If it is a sweep's, remove the directory and begin anew"
        ) from error
    if not isinstance(run, dict):
        raise SourceError(f"{directory / RUN} is no table of facts on a run")
    return run
