"""Run `layersurgery report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from layersurgery.units import format_bytes

from ..terminal.console import Console


def run_report(directories: Sequence[Path], output: Path | None, overwrite: bool, console: Console) -> None:
    """Write the page, and print what it contains and what is missing."""
    from layersurgery import report

    page = report(directories, output, overwrite=overwrite)
    value = {
        "path": str(page.path),
        "bytes": page.bytes,
        "runs": [str(path) for path in page.runs],
        "not_shown": {str(path): reason for path, reason in page.not_shown.items()},
        "skipped": page.skipped,
    }
    lines = [
        *(f"[yellow]Not shown:[/] {escape(f'{path}: {reason}')}" for path, reason in page.not_shown.items()),
        *(f"[yellow]Left out:[/] {escape(item)}" for item in page.skipped),
        escape(
            f"Wrote {page.path}: {len(page.runs)} run{'s'[: len(page.runs) != 1]}, {format_bytes(page.bytes)}; "
            "open it in any browser"
        ),
    ]
    console.result(value, *lines)
