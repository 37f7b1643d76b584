"""Collect finished runs from directories, and read their tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ..errors import SourceError
from ..path_names import without_directories
from ..plans.route import Route
from ..registry import ANALYSES, PROPAGATION
from ..runs.run_directory import SWEEP
from ..runs.tables import RESULTS, RUN, read_run, read_table
from ..sweeps.map_sentences import describe_maps
from ..sweeps.propagation_results import propagation_sentence
from ..sweeps.results import CELL, precision_sentence, summary_sentence
from ..tasks.task_sentences import task_sentences

_DEPTH = 3
_CELLS = 6000
_OURS = "layersurgery "
_NOT_SHOWN = ("sequences", "tokens", "level")  # a search shows the candidates of all its levels in one table
_CURVES = Path(RESULTS).stem
_COLUMNS = ("model", "name", "plan", "edit", "layer", "relative_depth", "depth", "route", "kl_nats", "agreement")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Finished run, as a page shows it.

    Attributes:
        path: its directory.
        facts: the contents of its `run.json`.
        tables: the small tables, and regardless of their size a sweep's results and those of maps (see `is_map`).
        large: number of rows of each table that is too large to show row by row.
        words: summary of the results in a sentence; empty if there is none.
    """

    path: Path
    facts: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    large: Mapping[str, int]
    words: str

    @property
    def word(self) -> str:
        """Return the kind of run: "sweep", or the name of the analysis."""
        kind = str(self.facts.get("kind")).removeprefix(_OURS)
        return str(self.fact("arguments", "analysis", default=kind))

    @property
    def is_sweep(self) -> bool:
        """Return whether the run has results of edits."""
        return _CURVES in self.tables

    @property
    def model(self) -> str:
        """Return the model's full name."""
        return str(self.fact("arguments", "model", "name", default=None) or self._named() or "a model without a name")

    @property
    def short(self) -> str:
        """Return the last part of the model's name."""
        return self.model.rstrip("/").rpartition("/")[2] or self.model

    def fact(self, *names: str, default: Any = "") -> Any:
        """Return a nested entry of `run.json`, or the default; files of other versions may lack entries."""
        value: Any = self.facts
        for name in names:
            if not isinstance(value, Mapping) or value.get(name) is None:
                return default
            value = value[name]
        return value

    def _named(self) -> str:
        for frame in self.tables.values():
            if "model" in frame and len(frame):
                return str(frame.model.iloc[0])
        return ""


@dataclass(slots=True)
class CollectedRuns:
    """Runs collected in directories.

    Attributes:
        runs: the finished runs.
        others: directories of runs that are not shown, and the reasons.
    """

    runs: list[FinishedRun] = field(default_factory=list)
    others: list[tuple[Path, str]] = field(default_factory=list)


def collect(directories: Sequence[str | os.PathLike[str]]) -> CollectedRuns:
    """Collect the finished runs in directories, searched three levels deep.

    Raises:
        SourceError: a path is not a directory or holds no run, or no run has finished.
    """
    collected = CollectedRuns()
    directories_by_path: dict[Path, Path] = {}
    for path in map(Path, directories):
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise SourceError(
                f"{path} {problem}; give directories that `layersurgery sweep`, `analyze` or `stages` wrote"
            )
        before = len(collected.others)
        below = [*_runs_below(path, _DEPTH, collected)]
        if not below and len(collected.others) == before:
            raise SourceError(
                f"{path} holds no results, and neither does a directory in it ({_DEPTH} levels were searched); "
                "give directories that `layersurgery sweep`, `analyze` or `stages` wrote"
            )
        for directory in below:
            directories_by_path.setdefault(directory.resolve(), directory)
    for directory in directories_by_path.values():
        _take(directory, collected)
    if not collected.runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in collected.others[:4])
        raise SourceError(f"no finished run to report on. {reasons or 'Give a directory of results'}")
    return collected


def _runs_below(directory: Path, depth: int, collected: CollectedRuns) -> Iterator[Path]:
    if (directory / RUN).is_file():
        yield directory
        return
    if not depth:
        return
    try:
        inside = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        collected.others.append((directory, f"cannot be listed: {error.strerror or error}"))
        return
    for path in inside:
        yield from _runs_below(path, depth - 1, collected)


def _take(directory: Path, collected: CollectedRuns) -> None:
    try:
        facts = read_run(directory) or {}
        if not str(facts.get("kind")).startswith(_OURS):
            collected.others.append((directory, f"its {RUN} was written by another program"))
        elif facts.get("state") != "finished":
            collected.others.append((directory, "has not finished; run the same command again to resume it"))
        else:
            collected.runs.append(_read(directory, facts))
    except SourceError as error:
        collected.others.append((directory, str(error)))
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        collected.others.append((directory, f"its tables cannot be read: {type(error).__name__}: {error}"))


def _read(directory: Path, facts: Mapping[str, Any]) -> FinishedRun:
    tables: dict[str, pd.DataFrame] = {}
    large = {}
    files = [str(name) for name in facts.get("files") or ([RESULTS] if facts["kind"] == SWEEP else [])]
    for file in dict.fromkeys(files):
        name = file.removesuffix(".parquet")
        if name == file or name in _NOT_SHOWN or Path(file).name != file:
            continue
        try:
            shape = pq.read_metadata(directory / file)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read {directory / file}: {getattr(error, 'strerror', None) or error}") from error
        if name != _CURVES and shape.num_rows * shape.num_columns > _CELLS:
            large[name] = shape.num_rows
            if not set(CELL) <= set(shape.schema.names):
                continue
        tables[name] = read_table(directory, name) if name in ("stages", _CURVES) else pd.read_parquet(directory / file)
    if _CURVES in tables:
        _check(tables[_CURVES])
    tables = {
        name: frame.assign(model=frame.model.map(without_directories)) if "model" in frame else frame
        for name, frame in tables.items()
    }
    run = FinishedRun(directory, _without_directories(facts), tables, large, "")
    return replace(run, words=_words(run))


def _without_directories(value: Any) -> Any:
    """Replace absolute paths in an entry of `run.json`, except in the command, whose words must be split first."""
    if isinstance(value, str):
        return without_directories(value)
    if isinstance(value, list):
        return [*map(_without_directories, value)]
    if isinstance(value, Mapping):
        return {
            without_directories(str(name)): item if name == "command" else _without_directories(item)
            for name, item in value.items()
        }
    return value


def _check(frame: pd.DataFrame) -> None:
    """Check that the results have the columns and routes expected."""
    if missing := [column for column in _COLUMNS if column not in frame]:
        raise ValueError(f"its results have no column {missing[0]!r}")
    for route in frame.route:
        Route.parse(str(route))


def is_map(frame: pd.DataFrame) -> bool:
    """Return whether a table is a map: its rows are cells, placed by whole numbers in the columns `from` and `to`."""
    return all(side in frame and pd.api.types.is_integer_dtype(frame[side]) for side in CELL) and len(frame) > 0


def _words(run: FinishedRun) -> str:
    if run.is_sweep:
        frame = run.tables[_CURVES]
        known = precision_sentence(frame) if "precise" in frame else ""
        reach = propagation_sentence(frame.attrs.get(PROPAGATION, []))
        said = [summary_sentence(frame), *task_sentences(frame), *describe_maps(frame), reach, known]
        return ". ".join(f"{sentence[0].upper()}{sentence[1:]}" for sentence in said if sentence)
    summary = run.facts.get("summary")
    if isinstance(summary, str):
        return summary
    if run.word not in ANALYSES:
        return ""
    from ..analyses.descriptions import describe

    return describe(run.word, run.tables)


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a short, unique label for each run.

    It is the model's name, with the directory if a model has several runs; runs of one model are named by directory.
    """
    names = [run.short for run in runs]
    if len({run.model for run in runs}) == 1 and len(runs) > 1 and len({run.path.name for run in runs}) == len(runs):
        return [run.path.name for run in runs]
    above = os.path.commonpath([run.path.resolve() for run in runs]) if runs else ""
    for describe in (lambda run: run.path.name, lambda run: os.path.relpath(run.path.resolve(), above)):
        if len(set(names)) == len(names):
            break
        names = [
            f"{run.short} ({describe(run)})" if names.count(name) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return names
