"""Run the measuring commands: make a session, run one measurement in it, and print the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.quick_imports import quick_imports

from ..terminal.console import Console

if TYPE_CHECKING:
    from layersurgery.runs.options import RunOptions
    from layersurgery.runs.requests import GivenText
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.session import ModelSession


def measure(
    model: str,
    options: RunOptions,
    output: Path | None,
    name: str,
    console: Console,
    run: Callable[[ModelSession, Path], Run],
    given: GivenText | None = None,
) -> Run | None:
    """Run one measurement, and show its progress.

    Args:
        model: the model's name.
        options: options of the measurement.
        output: where to write; by default a directory named after the model and the measurement.
        name: name of the measurement.
        console: where to print.
        run: runs it in a session and a directory.
        given: the tasks that are measured instead of the text that the options name.

    Returns:
        The finished run; None in a process that another one leads.
    """
    from layersurgery.runs.processes import run_session

    return run_session(
        model,
        options,
        lambda session: run(session, output or Path(f"{session.model.name}-{name}")),
        reporter=console,
        given=given,
    )


def run_sweep(
    model: str, edits: Any, bounds: dict[str, Any], tasks: dict[str, Any], options: RunOptions, output: Path | None,
    overwrite: bool, console: Console,
) -> None:  # fmt: skip
    """Measure the effect of the edits, within `layers` and `max_span` of the bounds, on a text, on tasks or on both."""
    with quick_imports():
        from layersurgery.runs.sweep import place_tasks, task_request
        from layersurgery.runs.sweep import run_sweep as run_in

    from ..terminal.sweep_results import show_sweep

    options, given, beside = place_tasks(task_request(**tasks), options, None)
    run = measure(
        model,
        options,
        output,
        "sweep",
        console,
        lambda session, directory: run_in(session, directory, edits, **bounds, tasks=beside, overwrite=overwrite),
        given,
    )
    if run is not None:
        show_sweep(run, console)


def run_analysis(
    name: str, model: str, options: RunOptions, output: Path | None, overwrite: bool, console: Console,
    by: str | None = None, task: dict[str, Any] | None = None, **own: Any,
) -> None:  # fmt: skip
    """Run an analysis, and print its results; `own` are the options that only this analysis has."""
    with quick_imports():
        from layersurgery.analyses.analyze import run_analysis as run_in
        from layersurgery.analyses.rank_run import check_ranking
        from layersurgery.analyses.task_criterion import given_task

    from ..terminal.analysis_results import show_analysis

    check_ranking(by)
    given = None if task is None else given_task(by, options=options, **task)
    run = measure(
        model,
        options,
        output,
        name,
        console,
        lambda session, directory: run_in(session, name, directory, overwrite=overwrite, **own),
        given,
    )
    if run is not None:
        show_analysis(run, console)
