"""Analyses that one process does in one go: of weights, or of windows cut from text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analyses import draw_analysis
from .command import given
from .talk import Talk

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.run_directory import Run

Made = tuple[dict[str, "pd.DataFrame"], dict[str, Any]]


def look(directory: Path, arguments: Mapping[str, Any], talk: Talk, make: Callable[[], Made], *, anew: bool) -> Run:
    """A directory of tables and figures, made now or found finished.

    Args:
        directory: where to.
        arguments: all that the digits depend on, but for versions.
        talk: how it speaks.
        make: the tables, the first one first, and facts for `run.json`.
        anew: replace what another run has left there.
    """
    from layersurgery.analyses.outcomes import write_tables
    from layersurgery.runs.run_directory import ANALYSIS, open_run, versions
    from layersurgery.runs.runner import drawn_by

    arguments = {**arguments, "versions": versions()}
    with open_run(directory, arguments, kind=ANALYSIS, overwrite=anew, command=given()) as run:
        if run.finished:
            talk.say(f"The run in {run.directory} has finished; nothing to do. --overwrite measures it anew")
            return run
        frames, facts = make()
        run.begin()
        run.note(files=write_tables(run.directory, frames), **facts)
        first = next(iter(frames.values()))
        figures, fault = drawn_by(lambda _, place: draw_analysis(place, run.facts), first, run.directory)
        run.note(state="finished", figures=figures, figures_fault=fault)
        return run


@contextmanager
def counting(talk: Talk, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, from the first count to the last; call it with how many are done, and of how many."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn(f"{{task.completed}}/{{task.total}} {what}"),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=talk.err, transient=True)
    task = progress.add_task("", total=None)

    # On screen only while it counts: older versions of rich refuse two bars, or a bar and a spinner, at once.
    def count(done: int, of: int) -> None:
        if not talk.err.is_terminal or talk.err.quiet:
            return
        progress.update(task, completed=done, total=of)
        (progress.stop if done >= of else progress.start)()

    try:
        yield count
    finally:
        if progress.live.is_started:
            progress.stop()
