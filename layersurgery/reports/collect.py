"""Finished runs below some directories, and what their tables hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ..errors import SourceError
from ..plans.route import Route
from ..runs.run_directory import SWEEP
from ..runs.tables import RESULTS, RUN, read_run, read_table
from ..sweeps.results import summary_sentence

_DEPTH = 3
_CELLS = 6000
_OURS = "layersurgery "
_NOT_SHOWN = ("sequences", "tokens")
_CURVES = Path(RESULTS).stem
_COLUMNS = ("model", "name", "plan", "edit", "layer", "relative_depth", "depth", "route", "kl_nats", "agreement")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run, as a page shows it.

    Attributes:
        path: its directory.
        facts: what its `run.json` says.
        tables: those that are small, and a sweep's results whatever their size.
        large: rows of the tables that are not shown.
        words: what it found, in a sentence; empty where nothing is said.
    """

    path: Path
    facts: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    large: Mapping[str, int]
    words: str

    @property
    def word(self) -> str:
        """What kind of run: "sweep", or the analysis's name."""
        kind = str(self.facts.get("kind")).removeprefix(_OURS)
        return str(self.fact("arguments", "analysis", default=kind))

    @property
    def is_sweep(self) -> bool:
        """Whether it has results of edits."""
        return _CURVES in self.tables

    @property
    def model(self) -> str:
        """The model's name in full."""
        return str(self.fact("arguments", "model", "name", default=None) or self._named() or "a model without a name")

    @property
    def short(self) -> str:
        """The last part of the model's name."""
        return self.model.rstrip("/").rpartition("/")[2] or self.model

    def fact(self, *names: str, default: Any = "") -> Any:
        """One fact, however deep, or the default; other programs' and later versions' files may have others."""
        found: Any = self.facts
        for name in names:
            if not isinstance(found, Mapping) or found.get(name) is None:
                return default
            found = found[name]
        return found

    def _named(self) -> str:
        for frame in self.tables.values():
            if "model" in frame and len(frame):
                return str(frame.model.iloc[0])
        return ""


@dataclass(slots=True)
class CollectedRuns:
    """What lies below directories.

    Attributes:
        runs: those that have finished.
        others: directories of runs that are not shown, and why.
    """

    runs: list[FinishedRun] = field(default_factory=list)
    others: list[tuple[Path, str]] = field(default_factory=list)


def collect(directories: Sequence[str | os.PathLike[str]]) -> CollectedRuns:
    """Every finished run in directories of results, or in directories of such directories, three levels down.

    Raises:
        SourceError: a directory that is none or holds no run, or no run that has finished.
    """
    found = CollectedRuns()
    places: dict[Path, Path] = {}
    for given in map(Path, directories):
        if not given.is_dir():
            what = "is no directory" if given.exists() else "is not there"
            raise SourceError(
                f"{given} {what}; give directories that `layersurgery sweep`, `analyze` or `stages` wrote"
            )
        before = len(found.others)
        below = [*_runs_below(given, _DEPTH, found)]
        if not below and len(found.others) == before:
            raise SourceError(
                f"{given} holds no results, and neither does a directory in it ({_DEPTH} levels were looked at); give directories that "
                "`layersurgery sweep`, `analyze` or `stages` wrote"
            )
        for place in below:
            places.setdefault(place.resolve(), place)
    for place in places.values():
        _take(place, found)
    if not found.runs:
        why = "; ".join(f"{path}: {reason}" for path, reason in found.others[:4])
        raise SourceError(f"no finished run to report on. {why or 'Give a directory of results'}")
    return found


def _runs_below(place: Path, depth: int, found: CollectedRuns) -> Iterator[Path]:
    if (place / RUN).is_file():
        yield place
        return
    if not depth:
        return
    try:
        inside = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        found.others.append((place, f"cannot be listed: {error.strerror or error}"))
        return
    for path in inside:
        yield from _runs_below(path, depth - 1, found)


def _take(place: Path, found: CollectedRuns) -> None:
    try:
        facts = read_run(place) or {}
        if not str(facts.get("kind")).startswith(_OURS):
            found.others.append((place, f"its {RUN} is another program's"))
        elif facts.get("state") != "finished":
            found.others.append((place, "has not finished; the command that began it, given again, goes on with it"))
        else:
            found.runs.append(_read(place, facts))
    except SourceError as error:
        found.others.append((place, str(error)))
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        found.others.append((place, f"its tables are not what they should be: {type(error).__name__}: {error}"))


def _read(place: Path, facts: Mapping[str, Any]) -> FinishedRun:
    tables: dict[str, pd.DataFrame] = {}
    large = {}
    files = [str(name) for name in facts.get("files") or ([RESULTS] if facts["kind"] == SWEEP else [])]
    for file in dict.fromkeys(files):
        name = file.removesuffix(".parquet")
        if name == file or name in _NOT_SHOWN or Path(file).name != file:
            continue
        try:
            shape = pq.read_metadata(place / file)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read {place / file}: {getattr(error, 'strerror', None) or error}") from error
        if name != _CURVES and shape.num_rows * shape.num_columns > _CELLS:
            large[name] = shape.num_rows
            continue
        tables[name] = read_table(place, name) if name in ("stages", _CURVES) else pd.read_parquet(place / file)
    if _CURVES in tables:
        _check(tables[_CURVES])
    return FinishedRun(place, facts, tables, large, _words(facts, tables))


def _check(frame: pd.DataFrame) -> None:
    """Refuse results that another program, or another version, wrote otherwise."""
    if missing := [column for column in _COLUMNS if column not in frame]:
        raise ValueError(f"its results have no column {missing[0]!r}")
    for route in frame.route:
        Route.parse(str(route))


def _words(facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> str:
    if _CURVES in tables:
        return summary_sentence(tables[_CURVES])
    if "stages" in tables:
        from ..analyses.inference_stages import describe_stages

        return describe_stages(tables["stages"])
    said = facts.get("summary")
    return said if isinstance(said, str) else ""


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """A short name for each, no two alike: the model's, with the directory where models have several runs, or that one alone."""
    names = [run.short for run in runs]
    if len({run.model for run in runs}) == 1 and len(runs) > 1 and len({run.path.name for run in runs}) == len(runs):
        return [run.path.name for run in runs]
    for tell in (lambda run: run.path.name, lambda run: str(run.path)):
        if len(set(names)) == len(names):
            break
        names = [
            f"{run.short} ({tell(run)})" if names.count(name) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    return names
