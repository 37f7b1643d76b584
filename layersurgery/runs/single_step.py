"""Run analyses that one process does in one step: of weights, or of windows cut from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import draw_analysis
from .dry_run import DryRun
from .reporter import Reporter
from .run_directory import ANALYSIS, Run, find_state, open_run, package_versions
from .run_record import RunRecord
from .runner import draw_safely
from .tables import write_tables

if TYPE_CHECKING:
    import pandas as pd

TablesAndFacts = tuple[dict[str, "pd.DataFrame"], RunRecord]


def run_once(
    directory: Path,
    arguments: Mapping[str, Any],
    reporter: Reporter,
    make: Callable[[], TablesAndFacts],
    *,
    overwrite: bool,
    caption: str = "",
) -> Run:
    """Make a directory of tables and figures, unless it holds the finished run already.

    Args:
        directory: where to write.
        arguments: everything the results depend on, except versions.
        reporter: receives what is said.
        make: returns the tables, the main one first, and facts for `run.json`.
        overwrite: replace what another run has left in the directory.
        caption: what is measured, in words; empty if nothing is but weights.

    Returns:
        The finished run.

    Raises:
        DryRun: the reporter's command is a dry run.
    """
    arguments = {**arguments, "versions": package_versions()}
    if reporter.dry_run:
        state = find_state(directory, arguments, kind=ANALYSIS, overwrite=overwrite)
        raise DryRun(arguments["model"]["name"], caption, directory, state)
    with open_run(directory, arguments, kind=ANALYSIS, overwrite=overwrite, command=reporter.command) as run:
        if run.finished:
            reporter.finished(run.directory)
            return run
        frames, facts = make()
        run.start()
        run.update({"skipped": {}, **facts, "files": write_tables(run.directory, frames)})
        first = next(iter(frames.values()))
        figures, error = draw_safely(lambda _, path: draw_analysis(path, run.facts), first, run.directory)
        run.update({"state": "finished", "figures": figures, "figure_error": error})
        return run
