"""Run analyses that one process does in one step: of weights, or of windows cut from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal.console import Console, recorded_command
from .figures import draw_analysis

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

TablesAndFacts = tuple[dict[str, "pd.DataFrame"], dict[str, Any]]


def run_once(
    directory: Path,
    arguments: Mapping[str, Any],
    console: Console,
    make: Callable[[], TablesAndFacts],
    *,
    overwrite: bool,
) -> Run:
    """Make a directory of tables and figures, unless it holds the finished run already.

    Args:
        directory: where to write.
        arguments: everything the results depend on, except versions.
        console: where to print.
        make: returns the tables, the main one first, and facts for `run.json`.
        overwrite: replace what another run has left in the directory.

    Returns:
        The finished run.
    """
    from layersurgery.analyses.outcomes import write_tables
    from layersurgery.runs.run_directory import ANALYSIS, open_run, package_versions
    from layersurgery.runs.runner import draw_safely

    arguments = {**arguments, "versions": package_versions()}
    with open_run(directory, arguments, kind=ANALYSIS, overwrite=overwrite, command=recorded_command()) as run:
        if run.finished:
            console.log(f"The run in {run.directory} has finished; nothing to do. Use --overwrite to measure again")
            return run
        frames, facts = make()
        run.start()
        run.update(files=write_tables(run.directory, frames), **facts)
        first = next(iter(frames.values()))
        figures, error = draw_safely(lambda _, path: draw_analysis(path, run.facts), first, run.directory)
        run.update(state="finished", figures=figures, figure_error=error)
        return run
