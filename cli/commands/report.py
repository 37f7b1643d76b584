"""`layersurgery report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from ..terminal.console import Console, format_bytes


def run_report(directories: Sequence[Path], output: Path | None, overwrite: bool, console: Console) -> None:
    """Write the page, and say what is in it and what is not."""
    from layersurgery import report

    made = report(directories, output, overwrite=overwrite)
    value = {
        "path": str(made.path),
        "bytes": made.bytes,
        "runs": [str(path) for path in made.runs],
        "not_shown": {str(path): why for path, why in made.not_shown.items()},
        "skipped": made.skipped,
    }
    shown = [
        *(f"[yellow]Not shown:[/] {escape(f'{path}: {why}')}" for path, why in made.not_shown.items()),
        *(f"[yellow]Left out:[/] {escape(what)}" for what in made.skipped),
        escape(
            f"Wrote {made.path}: {len(made.runs)} run{'s'[: len(made.runs) != 1]}, {format_bytes(made.bytes)}; open it in any browser"
        ),
    ]
    console.result(value, *shown)
