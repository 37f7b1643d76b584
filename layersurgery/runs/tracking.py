"""Log a run's numbers to experiment trackers, through accelerate's: TensorBoard, trackio and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, PlanError, SourceError
from ..path_names import without_directories
from ..registry import ANALYSES, METRICS, TAILS, first_metrics

if TYPE_CHECKING:
    import pandas as pd

    from .reporter import Reporter
    from .runner import Progress

TRACKERS = {"tensorboard": "layersurgery[track]", "trackio": "trackio", "wandb": "wandb"}
"""The trackers, and what to install for each."""
PROJECT = "layersurgery"
LOGGING_DIRECTORY = "runs"
"""Where TensorBoard's files are written: its own default, in the current directory."""
# Columns that name a row: an edit, or what a table has instead. Two families may have one edit in common.
_LABELS = (
    ("name",), ("plan",), ("layer",), ("edit", "name"), ("edit", "plan"), ("layer", "part"), ("criterion", "removed"),
)  # fmt: skip
_MOST_ROWS = 512
_SHARE_OF_TIME = 20  # the table is made again only after so many times the time that it took
_OF_EDITS = [entry.name for entry in (*METRICS, *TAILS)]
_OF_LAYERS = [entry.name for analysis in ANALYSES.values() for entry in analysis.columns]
Log = Callable[[Mapping[str, float], int], None]


def tracker_names(track: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the trackers that were asked for.

    Raises:
        PlanError: a tracker is unknown.
        SourceError: its package is not installed.

    Example:
        >>> from layersurgery.runs.tracking import tracker_names
        >>> tracker_names(None), tracker_names("tensorboard")
        ((), ('tensorboard',))
    """
    names = track.split(",") if isinstance(track, str) else track or ()
    unique = tuple(dict.fromkeys(name.strip() for name in names))
    for name in unique:
        if name not in TRACKERS:
            raise PlanError(f"tracker {name!r} is unknown; use {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise SourceError(f"`track` {name} needs a package that is not installed: pip install '{TRACKERS[name]}'")
    return unique


class Tracking:
    """Log the progress of a run and its tables.

    Args:
        log: takes numbers by name, and how many sequences are measured.
        note: takes what the user should know.
    """

    def __init__(self, log: Log, note: Callable[[str], None]) -> None:
        self._log, self._note = log, note
        self._next_table = -math.inf
        self._is_noted = False
        self._done: int | None = None

    def following(self, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
        """Return a function that takes a run's `Progress`, passes it on and logs it."""

        def follow(progress: Progress) -> None:
            if on_progress is not None:
                on_progress(progress)
            self._progress(progress)

        return follow

    def _progress(self, progress: Progress) -> None:
        """Log after a batch how much is done, and the results so far unless they were logged just before."""
        if progress.table is None:
            return
        done, started = int(progress.sequences), time.monotonic()
        self._done = done
        self._log({"progress/sequences": done, "progress/share": done / progress.total}, done)
        if started >= self._next_table:
            self.table(progress.table(), done)
            ended = time.monotonic()
            self._next_table = ended + _SHARE_OF_TIME * (ended - started)

    def last_table(self, frame: pd.DataFrame, sequences: int) -> None:
        """Log the numbers of the final table, of a text of so many sequences: a run may end before the text does."""
        self.table(frame, sequences if self._done is None else self._done)

    def table(self, frame: pd.DataFrame, step: int) -> None:
        """Log the numbers of each row of a table, by the name of its edit or its layer."""
        label = next(
            (names for names in _LABELS if {*names} <= {*frame} and not frame.duplicated([*names]).any()), None
        )
        many = f"{len(frame):,} rows are too many" if len(frame) > _MOST_ROWS else ""
        if many or label is None:
            if not self._is_noted:
                why = many or "rows without names of their own are nothing"
                self._note(f"{why} for a tracker, which gets the progress only")
                self._is_noted = True
            return
        known = _OF_LAYERS if label == ("layer",) else _OF_EDITS
        columns = [name for name in dict.fromkeys(known) if name in frame] + first_metrics(frame.columns)
        values = {
            f"{column}/{' '.join(str(row[name]) for name in label)}": float(row[column])
            for row in frame.to_dict("records")
            for column in columns
            if isinstance(row[column], int | float) and math.isfinite(row[column])
        }
        if values:
            self._log(values, step)


@contextmanager
def open_trackers(
    names: Sequence[str], run: str, config: Mapping[str, Any], reporter: Reporter, *, resumed: bool
) -> Iterator[Log | None]:
    """Start a run in each tracker, and give a function that logs to all; None if there are none.

    Args:
        names: names of trackers.
        run: the run's name.
        config: what the run depends on. Trackers are told it without the directories of this machine.
        resumed: an interrupted run goes on, in each tracker, too.
        reporter: is told if a tracker fails, which then gets no more numbers; the run goes on.

    Raises:
        OutputError: a tracker cannot be started.
    """
    if not names:
        yield None
        return
    from accelerate.state import PartialState

    # accelerate's trackers ask it for the processes of this program. It is made to forget them, unless others use it.
    is_ours = not PartialState._shared_state
    PartialState(cpu=True)
    active: dict[str, Any] = {}
    try:
        for name in names:
            try:
                active[name] = _start(name, run, _flat(config), resumed=resumed)
            except Exception as error:  # each tracker raises its own
                raise OutputError(f"cannot start {name}: {_first_line(error)}") from error

        def log(values: Mapping[str, float], step: int) -> None:
            for name, tracker in list(active.items()):
                try:
                    tracker.log(dict(values), step=step)
                except Exception as error:  # the results matter more
                    reporter.note(f"{name} failed and is not used any more: {_first_line(error)}")
                    del active[name]

        yield log
    finally:
        for tracker in active.values():
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                tracker.finish()
        if is_ours:
            PartialState._reset_state()


def run_name(directory: Path) -> str:
    """Return the name of a run in the trackers: its directory, from the current one."""
    own, here = directory.resolve(), Path.cwd().resolve()
    return own.relative_to(here).as_posix() if own.is_relative_to(here) and own != here else own.name


def _start(name: str, run: str, config: Mapping[str, Any], *, resumed: bool) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    own: dict[str, Any] = {}
    if name == "wandb":  # it knows a run by its id: the same place, name and arguments are the same run
        place = f"{platform.node()} {Path.cwd()} {run} {sorted(config.items())}"
        own = {"id": hashlib.sha256(place.encode()).hexdigest()[:16], "resume": "allow"}
    elif name == "trackio" and resumed:  # it knows a run by its name
        own = {"resume": "allow"}
    # stdout is for results.
    with contextlib.redirect_stdout(sys.stderr):
        if kind.requires_logging_directory:
            tracker = kind(run, logging_dir=LOGGING_DIRECTORY)
        else:
            tracker = kind(PROJECT, name=run.replace("/", "-"), **own)
        tracker.start()
        tracker.store_init_configuration(dict(config))
    return tracker


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by the path of their names; a list becomes text, and a path its last name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float) else without_directories(str(value))
    return flat


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
