"""The directory that a sweep writes into, and goes on in when it was stopped.

The same arguments, given again, find what was measured; other arguments are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_file, directory_lock
from ..errors import OutputError
from ..version import __version__
from .per_token import PARTS, TOKENS
from .tables import CSV, RESULTS, RUN, SEQUENCES, TABLES, read_run

JOURNAL = "progress.journal"
SWEEP, ANALYSIS = "layersurgery sweep", "layersurgery analysis"
KINDS = {SWEEP: "a sweep", ANALYSIS: "an analysis"}


@dataclass(slots=True)
class Run:
    """A directory that a sweep or an analysis writes into, held by this process.

    Attributes:
        directory: where.
        kind: one of `KINDS`.
        arguments: everything that the digits depend on.
        facts: what `run.json` says.
        command: the command line that a new run notes, to be repeated; empty where there was none.
    """

    directory: Path
    kind: str
    arguments: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def finished(self) -> bool:
        """Whether its results are there already."""
        return self.facts.get("state") == "finished"

    @property
    def started(self) -> bool:
        """Whether an earlier start has left something to go on with."""
        return bool(self.facts) and (self.directory / JOURNAL).exists()

    def start(self) -> None:
        """Make room for a new run, unless there is one to go on with. An earlier one is removed only now, when all is ready."""
        if not self.started:
            _clear(self.directory)
            self.update(
                kind=self.kind,
                state="begun",
                arguments=self.arguments,
                **({"command": self.command} if self.command else {}),
            )

    def update(self, **facts: Any) -> None:
        """Write facts to `run.json`."""
        self.facts |= facts
        with atomic_file(self.directory / RUN) as partial:
            partial.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def open_run(
    directory: Path, arguments: dict[str, Any], *, kind: str = SWEEP, overwrite: bool = False, command: str = ""
) -> Iterator[Run]:
    """Hold a directory for a run of a kind with these arguments: a new one, or one that such a run has begun or finished.

    Raises:
        OutputError: it holds something else, or a run with other arguments (says which), or another process writes to it.
    """
    arguments = json.loads(json.dumps(arguments))
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise OutputError(f"{directory} exists and is no directory; choose another output with -o")
    fresh = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {directory}: {error.strerror or error}") from error
    with directory_lock(directory):
        run = _run_in(directory, kind, arguments, overwrite)
        run.command = command
        try:
            yield run
        except BaseException:
            if fresh:  # goes only if it is empty
                with suppress(OSError):
                    directory.rmdir()
            raise


def _run_in(directory: Path, kind: str, arguments: dict[str, Any], overwrite: bool) -> Run:
    before = read_run(directory)
    if any(directory.iterdir()) and not _ours(before, kind):
        raise OutputError(f"{directory} holds something else than {KINDS[kind]}; choose another output with -o")
    run = Run(directory, kind, arguments, before or {})
    if before is None or overwrite or not (run.finished or run.started):
        return Run(directory, kind, arguments)
    there = before.get("arguments", {})
    if there.get("analysis") != arguments.get("analysis"):  # then nothing else is worth comparing
        there, arguments = ({"analysis": given.get("analysis")} for given in (there, arguments))
    if changed := _changed(there, arguments):
        raise OutputError(
            f"{directory} holds {KINDS[kind]} with other arguments: {changed}. Say --overwrite to start anew, or choose another output with -o"
        )
    if run.finished:  # and was killed before it had cleared up
        clear_progress(directory)
    return run


def _ours(run: dict[str, Any] | None, kind: str) -> bool:
    """Whether a run.json is one of this kind; other programs call files so, too."""
    return run is not None and run.get("kind") == kind and isinstance(run.get("arguments"), dict)


def clear_progress(directory: Path) -> None:
    """Remove what only an unfinished run needs."""
    (directory / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(directory / PARTS, ignore_errors=True)


def _clear(directory: Path) -> None:
    before = read_run(directory) or {}
    tables = (
        [f"{name}.{kind}" for name in TABLES for kind in ("parquet", "csv", "png", "svg")]
        if before.get("kind") == ANALYSIS
        else []
    )
    for name in (*tables, *before.get("figures", []), *before.get("files", []), RESULTS, CSV, SEQUENCES, TOKENS, RUN):
        (directory / Path(str(name)).name).unlink(missing_ok=True)
    clear_progress(directory)


def _changed(before: Any, now: Any, where: str = "") -> str:
    """What differs, in words; empty where nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        found = [_changed(before.get(name), now.get(name), f"{where}{name} ") for name in names]
        return "; ".join(filter(None, found))
    if before == now:
        return ""
    if len(str(before)) + len(str(now)) > 120:
        return f"{where.strip()} differ"
    return f"{where}{_say(before)} there, {_say(now)} now"


def _say(value: Any) -> str:
    return "nothing" if value is None else str(value)


def versions() -> dict[str, str]:
    """Of what the digits depend on."""
    return {"layersurgery": __version__, **{name: version(name) for name in ("torch", "transformers")}}
