"""Write one HTML page about the runs in directories of results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_io import atomic_file
from ..errors import OutputError
from .collect import collect
from .images import pictures
from .page import build_page

NAME = "report.html"
_MAX_BYTES = 3_000_000
_MAX_ROWS = (2000, 800, 300, 100)
_TEXT_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Report:
    """Page that was written.

    Attributes:
        path: the file.
        bytes: its size.
        runs: directories of the runs that the page shows.
        not_shown: directories that hold a run that the page does not show, and the reasons.
        skipped: tables, rows and figures that were left out to limit the page's size.
    """

    path: Path
    bytes: int
    runs: list[Path]
    not_shown: dict[Path, str]
    skipped: list[str]


def report(
    directories: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Report:
    """Write one self-contained HTML page about all finished runs in some directories.

    The page needs no network and no server, and has less than 3 MB. It summarizes the results in words, draws every
    edit and signal with values on hover, and shows all figures and tables, how each run was made, and the command that
    reproduces it. It lists everything that was left out to limit its size.

    Args:
        directories: results of `layersurgery sweep`, `analyze`, `stages`, `rank`, `prune` or `search`, or parent
            directories of them (searched three levels deep).
        output: file to write, or directory to write report.html to; by default, the current directory.
        overwrite: replace an existing file.

    Returns:
        The page, and what it does not show.

    Raises:
        SourceError: a directory has no results, or no run has finished.
        OutputError: the output exists (without `overwrite`) or cannot be written, or the page would be too large.

    Example:
        >>> import tempfile
        >>> import layersurgery as ls
        >>> directory = tempfile.mkdtemp()
        >>> frame = ls.sweep("smollm2-135m", "drop", "pydoc", directory=directory, tokens=64, context=32)
        >>> page = ls.report(directory, directory)
        >>> page.path.name, len(page.runs)
        ('report.html', 1)
    """
    paths = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    out = Path(output or NAME)
    out = out / NAME if out.is_dir() else out
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out} already exists; choose another output, or replace it (`overwrite`)")
    collected = collect(paths)
    for rows in _MAX_ROWS:
        size = len(build_page(collected, rows, [])[0].encode())
        if size <= _TEXT_SHARE * _MAX_BYTES:
            break
    images = pictures(collected.runs, _MAX_BYTES - size)
    text, skipped = build_page(collected, rows, images)
    page = text.encode()
    if len(page) > _MAX_BYTES:
        raise OutputError(
            f"a page about {len(collected.runs)} runs would have {len(page):,} bytes; give fewer directories"
        )
    skipped += [f"{picture.label}, {picture.name}: {picture.reason}" for picture in images if picture.reason]
    _write(out, page)
    return Report(out, len(page), [run.path for run in collected.runs], dict(collected.others), skipped)


def _write(out: Path, page: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {out.parent}: {error.strerror or error}; choose another output") from error
    with atomic_file(out) as partial:
        partial.write_bytes(page)
