"""From directories of results to one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_io import atomic_file
from ..errors import OutputError
from .collect import collect
from .html import document
from .images import pictures
from .sections import build_sections

NAME = "report.html"
_MOST_BYTES = 3_000_000
_MOST_ROWS = (2000, 800, 300, 100)
_FOR_TEXT = 0.75


@dataclass(frozen=True, slots=True)
class Report:
    """A page that was written.

    Attributes:
        path: of it.
        bytes: its size.
        runs: directories that are in it.
        not_shown: directories that hold a run and are not in it, and why.
        skipped: tables, rows and figures that had no room in it.
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
    """Write one self-contained page about all finished runs in some directories: no network, no server, under 3 MB.

    It says in words what was found, draws every edit and signal with values on hover, shows all figures and tables, how each run was
    made, and the command that repeats it. What has no room is named in it.

    Args:
        directories: what `layersurgery sweep`, `analyze`, `stages`, `rank` or `prune` wrote, or directories of such, three levels down.
        output: file to write, or directory to write report.html into; the present one if not given.
        overwrite: replace a file that exists.

    Returns:
        What was written, and what is not in it.

    Raises:
        SourceError: no results there, or none that have finished.
        OutputError: the output exists (without `overwrite`) or cannot be written, or the page would be too large.

    Example:
        >>> report(["smollm2-135m-sweep", "smollm2-135m-stages"]).path  # doctest: +SKIP
        PosixPath('report.html')
    """
    some = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    out = Path(output or NAME)
    out = out / NAME if out.is_dir() else out
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out} exists already; choose another output with -o, or say --overwrite to replace it")
    found = collect(some)
    for rows in _MOST_ROWS:
        size = len(document(*build_sections(found, rows, [])[:2]).encode())
        if size <= _FOR_TEXT * _MOST_BYTES:
            break
    drawn = pictures(found.runs, _MOST_BYTES - size)
    title, body, left = build_sections(found, rows, drawn)
    page = document(title, body).encode()
    if len(page) > _MOST_BYTES:
        raise OutputError(
            f"a page on {len(found.runs)} runs would have {len(page):,} bytes; give fewer directories at once"
        )
    left += [f"{picture.label}, {picture.name}: {picture.why}" for picture in drawn if picture.why]
    _write(out, page)
    return Report(out, len(page), [run.path for run in found.runs], dict(found.others), left)


def _write(out: Path, page: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {out.parent}: {error.strerror or error}; choose another output with -o"
        ) from error
    with atomic_file(out) as partial:
        partial.write_bytes(page)
