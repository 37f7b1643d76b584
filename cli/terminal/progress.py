"""Show the progress of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .analysis_results import progress_line
from .console import Console
from .live_table import live_table

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.text import TokenizedText

_SECONDS_BETWEEN_LINES = 30
_SECONDS_BETWEEN_SUMMARIES = 2
_SHARE_OF_TIME = 20  # the table is made again only after so many times the time that it took
_OTHER_LINES = 4  # of the terminal: the table's heading and last line, the bar, and one to spare


@contextmanager
def progress_bar(text: TokenizedText, console: Console) -> Iterator[Any]:
    """Show sequences or requests, tokens per second, time left and the results so far.

    On a terminal this is a progress bar, above it a table of a sweep's results so far; elsewhere, one line every 30
    seconds.

    Args:
        text: the tokens that are measured.
        console: where to print.

    Yields:
        A function that takes the run's `Progress`.
    """
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[summary]}"),
    )
    is_shown = console.err.is_terminal and not console.err.quiet
    tokens = text.tokens / len(text.ids)
    first: float | None = None
    started = time.monotonic()
    last = -math.inf if is_shown else started  # time of the latest summary
    summary, table, table_seconds = "", None, 0.0
    results: RenderableType = ""
    bar = Progress(*columns, console=console.err, speed_estimate_period=600)
    task = bar.add_task("", total=len(text.ids), done="", summary="")
    live = Live(console=console.err, transient=True, get_renderable=lambda: Group(results, bar))
    with live if is_shown else nullcontext():

        def on_progress(progress: Any) -> None:
            nonlocal first, last, results, summary, table, table_seconds
            # Sequences of an earlier, interrupted run took no time in this one.
            first = progress.sequences if first is None else first
            seconds = max(1e-9, time.monotonic() - started)
            rate = (progress.sequences - first) * tokens / seconds
            done = f"{progress.sequences:.1f}/{progress.total} {text.noun}s, {rate:,.3g} tokens/s"
            table = progress.table or table
            # The measurement waits for the table, which takes longer the more sequences there are.
            is_due = time.monotonic() - last > max(
                _SECONDS_BETWEEN_SUMMARIES if is_shown else _SECONDS_BETWEEN_LINES, _SHARE_OF_TIME * table_seconds
            )
            if is_due and table is not None and not console.err.quiet:
                started_table = time.monotonic()
                frame, table = table(), None
                table_seconds = time.monotonic() - started_table
                summary = _summarize(frame)
                if is_shown and _is_sweep(frame):
                    results = live_table(frame, max(1, console.err.height - _OTHER_LINES), progress.precision)
                last = time.monotonic()
            bar.update(task, completed=progress.sequences, done=done, summary=summary)
            if is_due and not is_shown:
                last = time.monotonic()
                left = f"{(progress.total - progress.sequences) * tokens / rate:,.0f} s left" if rate else ""
                at_most = "at most " if progress.stops and left else ""
                console.log("; ".join(filter(None, [done, at_most + left, summary])))

        yield on_progress


def _summarize(frame: pd.DataFrame) -> str:
    """Summarize a table of results so far in a few words."""
    if not _is_sweep(frame):
        return progress_line(frame)
    edited = frame[frame.edit != "none"].dropna(subset=["kl_nats"])
    if edited.empty:
        return ""
    worst, best = edited.loc[edited.kl_nats.idxmax()], edited.loc[edited.kl_nats.idxmin()]
    return f"worst {worst['name']} ({worst.kl_nats:.2g} nats), best {best['name']} ({best.kl_nats:.2g})"


def _is_sweep(frame: pd.DataFrame) -> bool:
    return "edit" in frame and "kl_nats" in frame


@contextmanager
def counter(console: Console, noun: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar that counts; only on a terminal.

    Args:
        console: where to print.
        noun: what is counted.

    Yields:
        A function that takes how many are done, and how many there are in total.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn(f"{{task.completed}}/{{task.total}} {noun}"),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console.err, transient=True)
    task = progress.add_task("", total=None)

    # The bar is on screen only while it counts: older versions of rich refuse two live displays at once.
    def count(done: int, total: int) -> None:
        if not console.err.is_terminal or console.err.quiet:
            return
        progress.update(task, completed=done, total=total)
        (progress.stop if done >= total else progress.start)()

    try:
        yield count
    finally:
        if progress.live.is_started:
            progress.stop()


class RunConsole(Console):
    """Console of a command that measures: it shows progress, too."""

    @contextmanager
    def count(self, noun: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar that counts; only on a terminal."""
        with counter(self, noun) as on_count:
            yield on_count

    @contextmanager
    def run_progress(self, text: TokenizedText) -> Iterator[Callable[[Any], None]]:
        """Show the progress of a run and its results so far."""
        with progress_bar(text, self) as on_progress:
            yield on_progress
