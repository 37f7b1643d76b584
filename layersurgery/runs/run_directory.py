"""Open the output directory of a sweep or an analysis, so that an interrupted run can resume in it.

A run with the same arguments continues from the batches that were measured. A run with other arguments is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..atomic_io import atomic_file, check_room, directory_lock
from ..errors import OutputError
from ..registry import PROPAGATION
from ..version import __version__
from .dry_run import FINISHED, NEW, REPLACED, RESUMED
from .options import RunOptions
from .per_token import PARTS, TOKENS
from .run_record import RunRecord
from .tables import CSV, RESULTS, RUN, SEQUENCES, TABLES, TASKS, has_tasks_inside, read_run

JOURNAL = "sums.parts"
FORMER_JOURNAL = "progress.journal"  # a single file, which earlier versions wrote
SWEEP, ANALYSIS = "layersurgery sweep", "layersurgery analysis"
KINDS = {SWEEP: "a sweep", ANALYSIS: "an analysis"}
_OPTIONS = {entry.name for entry in fields(RunOptions)}


@dataclass(slots=True)
class Run:
    """Output directory of a sweep or an analysis, locked by this process.

    Attributes:
        directory: its path.
        kind: one of `KINDS`.
        arguments: all arguments that affect the digits of the results.
        facts: the content of `run.json`.
        command: the command line that a new run records, so that it can be repeated; empty if there is none.
        until: when the run stops before the end of the text (`StopRule.record`); None if it measures all text. A
            finished run with another value is continued, since its batches are kept.
    """

    directory: Path
    kind: str
    arguments: dict[str, Any]
    facts: RunRecord = field(default_factory=lambda: RunRecord())
    command: str = ""
    until: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Return whether the results have been written, as precise as they are asked for now."""
        recorded = self.facts.get("until")
        return self.facts.get("state") == "finished" and (recorded is None or recorded == self.until)

    @property
    def started(self) -> bool:
        """Return whether an earlier run with the same arguments can be resumed."""
        return bool(self.facts) and (self.directory / JOURNAL).exists()

    @property
    def measured(self) -> bool:
        """Return whether a batch of this run is measured, so that it can be resumed."""
        return self.started and any((self.directory / JOURNAL).glob("[0-9]*.npz"))

    def start(self) -> None:
        """Clear the directory for a new run, unless there is a run to resume.

        Earlier results are removed only here, when the new run is ready to measure.
        """
        if not self.started:
            earlier = read_run(self.directory) or RunRecord()
            # Killed between any two of these steps, the directory stays one of ours: `run.json` is replaced, not
            # removed, and only when no batches of another run can be taken for this one's. It names the results to
            # remove until they are removed.
            clear_progress(self.directory)
            facts: RunRecord = {"kind": self.kind, "state": "begun", "arguments": self.arguments}
            if self.command:
                facts["command"] = self.command
            old_results = _find_results(self.directory, earlier)
            if old_results:
                facts["replaced"] = old_results
            self.facts = RunRecord()
            self.update(facts)
            _remove_results(self.directory, old_results)
            self.facts.pop("replaced", None)
        if self.facts.get("until") != self.until or self.facts.get("state") == "finished":
            command: RunRecord = {"command": self.command} if self.command else {}
            self.update({"state": "begun", "until": self.until, **command})

    def clear_progress(self) -> None:
        """Remove the files that a finished run does not need; batches are kept if more text could be measured."""
        if self.facts.get("until") is None:
            clear_progress(self.directory)

    def update(self, facts: RunRecord) -> None:
        """Add facts to `run.json`."""
        self.facts |= facts
        with atomic_file(self.directory / RUN) as partial:
            partial.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def open_run(
    directory: Path,
    arguments: dict[str, Any],
    *,
    kind: str = SWEEP,
    overwrite: bool = False,
    command: str = "",
    until: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """Open and lock the output directory of a run while the `with` block runs.

    The directory may be new or empty, or contain an unfinished or finished run with the same arguments.

    Args:
        directory: its path; created if it does not exist.
        arguments: all arguments that affect the digits of the results.
        kind: one of `KINDS`.
        overwrite: accept a run with other arguments, which is removed when the new run starts.
        command: the command line to record in a new run.
        until: when the run stops before the end of the text; see `Run`.

    Raises:
        OutputError: the directory contains something else, or a run with other arguments (the message names them), or
            another process is writing to it.
    """
    arguments = json.loads(json.dumps(arguments))
    _check_directory(directory)
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {directory}: {error.strerror or error}") from error
    with directory_lock(directory):
        run = _find_run(directory, kind, arguments, overwrite, until)
        run.command = command
        if run.finished:  # the run may have been killed after it finished, before it removed these files
            run.clear_progress()
        try:
            yield run
        except BaseException:
            if is_new:  # rmdir removes it only if it is empty
                with suppress(OSError):
                    directory.rmdir()
            raise


def find_state(
    directory: Path,
    arguments: dict[str, Any],
    *,
    kind: str = SWEEP,
    overwrite: bool = False,
    until: dict[str, Any] | None = None,
) -> str:
    """Return what a run would do with its directory, one of the states of `dry_run`; nothing is written.

    The arguments and errors are those of `open_run`.
    """
    _check_directory(directory)
    if not directory.exists():
        check_room(directory, 0)
        return NEW
    run = _find_run(directory, kind, json.loads(json.dumps(arguments)), overwrite, until)
    if run.finished:
        return FINISHED
    if run.started:
        return RESUMED
    return NEW if read_run(directory) is None else REPLACED


def _check_directory(directory: Path) -> None:
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise OutputError(f"{directory} exists and is not a directory; choose another output")


@contextmanager
def saying_what_is_kept(directory: Path) -> Iterator[None]:
    """Add to an interruption between two runs in a directory that what they measured is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if str(stop) or not any(directory.rglob(RUN)):
            raise
        raise KeyboardInterrupt(f"results so far are in {directory}; run the same command again to resume") from None


def _find_run(
    directory: Path, kind: str, arguments: dict[str, Any], overwrite: bool, until: dict[str, Any] | None
) -> Run:
    """Return the run to resume or the finished run in a directory, or a new run; arguments as for `open_run`."""
    earlier = read_run(directory)
    # A run that was killed while it wrote its first file has left a part of it.
    is_empty = all(path.name == f".{RUN}.partial" for path in directory.iterdir())
    if not is_empty and not _is_our_run(earlier, kind):
        raise OutputError(f"{directory} contains something other than {KINDS[kind]}; choose another output")
    run = Run(directory, kind, arguments, earlier or {}, until=until)
    if (directory / FORMER_JOURNAL).exists() and not (run.finished or overwrite):
        raise OutputError(
            f"{directory} contains {KINDS[kind]} that an earlier version of layersurgery began, which this version "
            "cannot resume. Finish it with that version, start again (`overwrite`), or choose another output"
        )
    has_results = run.facts.get("state") == "finished"
    if earlier is None or overwrite or not (has_results or run.started):
        return Run(directory, kind, arguments, until=until)
    recorded = earlier.get("arguments", {})
    if recorded.get("analysis") != arguments.get("analysis"):  # different analyses have different arguments
        recorded, arguments = ({"analysis": values.get("analysis")} for values in (recorded, arguments))
    if differences := _describe_differences(recorded, arguments):
        if not (has_results or run.measured):  # it was stopped before there was anything to lose
            return Run(directory, kind, run.arguments, until=until)
        raise OutputError(
            f"{directory} contains {KINDS[kind]} with other arguments: {differences}. Replace it to start again "
            "(`overwrite`), or choose another output"
        )
    if has_results and not (run.finished or run.started):
        raise OutputError(
            f"{directory} contains {KINDS[kind]} that stopped at another precision, but not its measured batches "
            f"({JOURNAL}), so it cannot be continued. Overwrite it to measure again, or choose another output"
        )
    return run


def _is_our_run(run: RunRecord | None, kind: str) -> bool:
    """Return whether a run.json was written by a run of this kind; other programs use this file name too."""
    return run is not None and run.get("kind") == kind and isinstance(run.get("arguments"), dict)


def clear_progress(directory: Path) -> None:
    """Remove the files that only an unfinished run needs."""
    (directory / FORMER_JOURNAL).unlink(missing_ok=True)
    for name in (JOURNAL, PARTS):
        shutil.rmtree(directory / name, ignore_errors=True)


def _find_results(directory: Path, earlier: RunRecord) -> list[str]:
    """Return the names of the results of an earlier run, also of partly written ones, and of nothing else."""
    tables = (
        [f"{name}.{kind}" for name in TABLES for kind in ("parquet", "csv", "png", "svg")]
        if earlier.get("kind") == ANALYSIS
        else []
    )
    written = (*earlier.get("figures", []), *earlier.get("files", []), *earlier.get("replaced", []))
    of_sweep = (RESULTS, CSV, SEQUENCES, TOKENS, f"{PROPAGATION}.parquet", f"{PROPAGATION}.csv")
    names = [Path(str(name)).name for name in (*tables, *written, *of_sweep)]
    both = dict.fromkeys(file for name in names for file in (name, f".{name}.partial"))
    found = [file for file in both if (directory / file).is_file() or (directory / file).is_symlink()]
    return [*found, *([TASKS] if has_tasks_inside(earlier) and (directory / TASKS).is_dir() else [])]


def _remove_results(directory: Path, names: list[str]) -> None:
    for name in names:
        if name == TASKS:
            shutil.rmtree(directory / name, ignore_errors=True)
        else:
            (directory / name).unlink(missing_ok=True)


def _describe_differences(recorded: Any, current: Any, prefix: str = "") -> str:
    """Describe how two values of arguments differ; empty if they are equal.

    Args:
        recorded: the value in the directory's `run.json`.
        current: the value now.
        prefix: names of the arguments that lead to the values, each followed by a space.
    """
    if isinstance(recorded, dict) and isinstance(current, dict):
        names = [*recorded, *(name for name in current if name not in recorded)]
        differences = {
            name: _describe_differences(recorded.get(name), current.get(name), f"{prefix}{name} ") for name in names
        }
        found = {name: text for name, text in differences.items() if text}
        if len(found) > 1:
            found.pop("fingerprint", None)  # of the text: the others say why it differs
        return "; ".join(found.values())
    if recorded == current:
        return ""
    if len(str(recorded)) + len(str(current)) > 120:
        return f"{prefix.strip()} differ"
    name = prefix.split()[-1] if prefix else ""
    shown = f"`{name}` " if name in _OPTIONS else prefix
    return f"{shown}{_as_text(recorded)} there, {_as_text(current)} now"


def _as_text(value: Any) -> str:
    return "nothing" if value is None else str(value)


def package_versions(*others: str) -> dict[str, str]:
    """Return the versions of the packages that affect the digits of the results; `others` are optional ones in use."""
    return {"layersurgery": __version__, **{name: version(name) for name in ("torch", "transformers", *others)}}
