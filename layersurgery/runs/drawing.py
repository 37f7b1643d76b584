"""Draw the figures of finished runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from .run_directory import ANALYSIS
from .run_record import RunRecord
from .tables import PARQUET_ONLY, RUN, caption_of, noun_of, read_results, read_table, table_names

if TYPE_CHECKING:
    import pandas as pd

    from ..figures.style import ModelTables
    from ..figures.sweeps import Sweep


def model_tables(directory: Path, facts: RunRecord) -> ModelTables:
    """Read a directory's tables, with a label and a caption, for drawing."""
    from ..figures.style import ModelTables

    tables = {name: read_table(directory, name) for name in table_names(facts) if name not in PARQUET_ONLY}
    label = str(facts["arguments"]["model"]["name"]).rpartition("/")[2]
    return ModelTables(tables, label, caption_of(facts))


def draw_analysis(directory: Path, facts: RunRecord) -> list[Path]:
    """Draw one directory's tables; write the figures to the same directory."""
    from ..figures.analyses import draw_signals

    return draw_signals([model_tables(directory, facts)], directory)


def draw_sweep(frame: pd.DataFrame, directory: Path, facts: RunRecord) -> list[Path]:
    """Draw one sweep's results; write the figures to its directory."""
    from ..figures.sweeps import draw

    return draw([_sweep(frame, facts)], directory)


def _sweep(frame: pd.DataFrame, facts: RunRecord) -> Sweep:
    from ..figures.sweeps import Sweep

    return Sweep.of(frame, facts["arguments"]["text"]["data"], noun_of(facts))


def plot(directories: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = ".") -> list[Path]:
    """Draw the results in several directories together, each model under its own label, as PNG and SVG.

    Args:
        directories: directories that sweeps and analyses wrote.
        output: directory to write the figures to.

    Returns:
        The figures' paths.

    Raises:
        SourceError: a directory has no finished run.
        OutputError: the output directory cannot be made.
    """
    from ..figures.analyses import draw_signals
    from ..figures.sweeps import draw

    output = Path(output)
    found = [run for directory in map(Path, directories) for run in _runs_in(directory)]
    frames = {directory: read_results(directory) for directory in dict.fromkeys(found)}
    runs = {directory: frame.attrs["run"] for directory, frame in frames.items()}
    analyses = [directory for directory, run in runs.items() if run["kind"] == ANALYSIS]
    sweeps = [
        _sweep(frame, runs[directory]) for directory, frame in frames.items() if runs[directory]["kind"] != ANALYSIS
    ]
    models = [model_tables(directory, runs[directory]) for directory in analyses]
    labels = [model.label for model in models]
    for number, directory in enumerate(analyses):
        if labels.count(labels[number]) > 1:
            models[number] = dataclasses.replace(models[number], label=f"{labels[number]} ({directory.name})")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {output}: {error.strerror or error}; choose another output") from error
    return (draw(sweeps, output) if sweeps else []) + (draw_signals(models, output) if models else [])


def _runs_in(directory: Path) -> list[Path]:
    """Return the directory, or the run with figures in it, of a pruning or of a search."""
    inside = [directory / name for name in ("costs", "search") if (directory / name / RUN).is_file()]
    return [directory] if (directory / RUN).is_file() or not inside else inside
