"""Run `layersurgery plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from ..terminal.console import Console


def run_plot(directories: Sequence[Path], output: Path, console: Console) -> None:
    """Plot the results of several sweeps or analyses together, and print the files' names."""
    from layersurgery import plot

    written = plot(directories, output)
    console.result({"figures": [str(path) for path in written]}, *[escape(f"Wrote {path}") for path in written])
