"""Run `layersurgery push` and `layersurgery fetch-results`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from layersurgery.quick_imports import quick_imports
from layersurgery.units import format_bytes

from ..terminal.console import Console
from ..terminal.pushing import hub_bars, pushed_line, pushed_value


def run_push(directory: Path, repo: str, public: bool, message: str | None, dry_run: bool, console: Console) -> None:
    """Push a directory, and print what was pushed, file by file if it is a dry run."""
    with quick_imports():
        from layersurgery.repositories.push import push_directory

    if not dry_run:  # the Hub client shows its own progress bars
        console.log(f"Pushing {directory} to {repo}")
    with hub_bars(console):
        pushed = push_directory(directory, repo, public=public, message=message, dry_run=dry_run, note=console.note)
    console.result(pushed_value(pushed), *([_table(pushed.files)] if dry_run else []), escape(pushed_line(pushed)))


def _table(files: Mapping[str, int]) -> Table:
    """Return a table of files and their sizes."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    for name, size in sorted(files.items()):
        table.add_row(format_bytes(size), escape(name))
    return table


def run_fetch_results(repo: str, output: Path | None, revision: str | None, dry_run: bool, console: Console) -> None:
    """Fetch results, and print where they are; or list the files."""
    with quick_imports():
        from layersurgery.repositories.fetch_results import fetch_results, find_results

    if dry_run:
        directory, files = find_results(repo, output, revision=revision)
        count, size = len(files), format_bytes(sum(files.values()))
        line = f"Would fetch {count} file{'s'[: count != 1]} ({size}) and write {directory}; nothing was downloaded"
        console.result({"path": str(directory), "repo": repo, "files": files}, _table(files), escape(line))
        return
    console.log(f"Fetching {repo}")
    with hub_bars(console):
        directory = fetch_results(repo, output, revision=revision)
    console.result(
        {"path": str(directory), "repo": repo},
        escape(f"Wrote {directory}; show it with: layersurgery report {directory}"),
    )
