"""Analyses that one process does in one go: of weights, or of windows cut from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal.console import Console, recorded_command
from .figures import draw_analysis

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

Made = tuple[dict[str, "pd.DataFrame"], dict[str, Any]]


def run_once(
    directory: Path, arguments: Mapping[str, Any], console: Console, make: Callable[[], Made], *, overwrite: bool
) -> Run:
    """A directory of tables and figures, made now or found finished.

    Args:
        directory: where to.
        arguments: all that the digits depend on, but for versions.
        console: how it speaks.
        make: the tables, the first one first, and facts for `run.json`.
        anew: replace what another run has left there.
    """
    from layersurgery.analyses.outcomes import write_tables
    from layersurgery.runs.run_directory import ANALYSIS, open_run, versions
    from layersurgery.runs.runner import draw_safely

    arguments = {**arguments, "versions": versions()}
    with open_run(directory, arguments, kind=ANALYSIS, overwrite=overwrite, command=recorded_command()) as run:
        if run.finished:
            console.log(f"The run in {run.directory} has finished; nothing to do. --overwrite measures it anew")
            return run
        frames, facts = make()
        run.start()
        run.update(files=write_tables(run.directory, frames), **facts)
        first = next(iter(frames.values()))
        figures, fault = draw_safely(lambda _, place: draw_analysis(place, run.facts), first, run.directory)
        run.update(state="finished", figures=figures, figure_error=fault)
        return run
