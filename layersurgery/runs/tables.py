"""Results as tables: what their columns are, how they are written, read back and summed up in a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..atomic_io import whole_file
from ..errors import SourceError
from ..metrics.aggregation import Sums
from ..metrics.reference import METRICS
from ..plans.variants import Variant

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS = "results.parquet"
CSV = "results.csv"
SEQUENCES = "sequences.parquet"
RUN = "run.json"
TABLES = (
    "stages", "boundaries", "lens", "attention", "norms", "similarity", "drop", "neuron_scores", "neurons",
    "rank", "spans", "step", "costs", "subjoiners", "attention_to_words", "examples",
    "probe", "singles", "together", "effects",
)  # fmt: skip
"""Of analyses; also their figures are called so."""


def results(variants: Sequence[Variant], sums: Sums, model: str) -> pd.DataFrame:
    """One row for each model measured, the unedited one first.

    Args:
        variants: the models, in the order of the sums' routes; the first is the unedited one.
        sums: what was measured.
        model: its name.
    """
    means, errors = sums.means(), sums.errors()
    depth = len(variants[0].route)
    rows = []
    for number, variant in enumerate(variants):
        row: dict[str, Any] = {
            "model": model,
            "name": variant.name,
            "plan": variant.plan,
            "edit": variant.edit,
            "layer": variant.layer,
            "relative_depth": None if variant.layer is None else variant.layer / max(1, depth - 1),
            "depth": depth,
            "route": str(variant.route),
            "tokens": sums.tokens,
            "sequences": len(sums),
        }
        for place, metric in enumerate(METRICS):
            row[metric] = means[number, place]
            row[f"{metric}_sem"] = errors[number, place]
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.astype({"layer": "Int64", "relative_depth": "float64"})


def by_sequence(variants: Sequence[Variant], sums: Sums) -> pa.Table:
    """Sums of each sequence: one row for each sequence and model, from which the results' means and errors can be had again."""
    import numpy as np
    import pyarrow as pa

    sequences = [sequence for sequence, _, _ in sums]
    values = np.stack([array for _, _, array in sums])
    each = len(variants)
    columns: dict[str, Any] = {
        "sequence": pa.array(np.repeat(sequences, each), pa.int32()),
        "row": pa.array(np.tile(np.arange(each), len(sequences)), pa.int32()),
        "edit": pa.array([variant.edit for variant in variants] * len(sequences)).dictionary_encode(),
        "plan": pa.array([variant.plan for variant in variants] * len(sequences)).dictionary_encode(),
        "tokens": pa.array(np.repeat([count for _, count, _ in sums], each), pa.int32()),
    }
    for place, metric in enumerate(METRICS):
        columns[f"{metric}_sum"] = pa.array(values[:, :, place].reshape(-1))
    return pa.table(columns)


def write(directory: Path, frame: pd.DataFrame, sequences: pa.Table) -> None:
    """Write the results, each file whole or not at all.

    Args:
        directory: where.
        frame: what `results` gave.
        sequences: what `by_sequence` gave.
    """
    import pyarrow.parquet as pq

    with whole_file(directory / SEQUENCES) as partial:
        pq.write_table(sequences, partial, compression="zstd")
    write_table(directory, Path(RESULTS).stem, frame)


def write_table(directory: Path, name: str, frame: pd.DataFrame, *, csv: bool = True) -> list[str]:
    """Write one table as parquet, and as csv if wanted, each file whole or not at all; returns the files' names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if csv:
        with whole_file(directory / f"{name}.csv") as partial:
            frame.to_csv(partial, index=False)
    with whole_file(directory / f"{name}.parquet") as partial:
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
        raise SourceError(f"{place} holds no results: give a directory that `layersurgery sweep`, `analyze` or `stages` wrote")
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
        raise SourceError(f"cannot read {place / f'{name}.parquet'}: {getattr(error, 'strerror', None) or error}") from error


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


def intermediate(frame: pd.DataFrame, edit: str) -> pd.DataFrame:
    """Rows of one family of edits that touch neither the first two blocks nor the last two."""
    rows = frame[frame.edit == edit]
    reach = 1 if edit == "swap" else 0
    return rows[(rows.layer >= 2) & (rows.layer + reach <= rows.depth - 3)]


def headline(frame: pd.DataFrame) -> str:
    """How much of the predictions intermediate layers keep, in a sentence; empty where no layer is intermediate."""
    parts = []
    for edit in ("swap", "drop", "skip-attention", "skip-mlp"):
        kept = 100 * intermediate(frame, edit).agreement
        if len(kept) and kept.notna().all():
            parts.append(f"{kept.min():.0f}-{kept.max():.0f} % under {edit}, median {kept.median():.0f} %")
    if not parts:
        return ""
    first = parts[0].replace(" % under", " % of predictions under", 1)
    return "intermediate layers keep " + "; ".join([first, *parts[1:]])
