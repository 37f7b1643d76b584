"""Run `layersurgery plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from ..terminal.console import Console


def run_plot(directories: Sequence[Path], output: Path, console: Console) -> None:
    """Plot the results of several sweeps or analyses together, and print the files' names."""
    written = draw_all(directories, output)
    console.result({"figures": [str(path) for path in written]}, *[escape(f"Wrote {path}") for path in written])


def draw_all(directories: Sequence[Path], output: Path) -> list[Path]:
    """Draw the results in several directories together.

    Returns:
        The figures' paths.

    Raises:
        OutputError: the output directory cannot be made.
    """
    from layersurgery.errors import OutputError
    from layersurgery.figures.sweeps import Sweep, draw
    from layersurgery.runs.run_directory import ANALYSIS
    from layersurgery.runs.tables import read_results

    from ..session.figures import draw_together

    frames = {directory: read_results(directory) for directory in dict.fromkeys(directories)}
    runs = {directory: frame.attrs["run"] for directory, frame in frames.items()}
    analyses = [(directory, run) for directory, run in runs.items() if run["kind"] == ANALYSIS]
    sweeps = [
        Sweep.of(frame, runs[directory]["arguments"]["text"]["data"])
        for directory, frame in frames.items()
        if runs[directory]["kind"] != ANALYSIS
    ]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {output}: {error.strerror or error}; choose another directory with -o"
        ) from error
    return (draw(sweeps, output) if sweeps else []) + (draw_together(analyses, output) if analyses else [])
