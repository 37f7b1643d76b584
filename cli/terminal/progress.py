"""Progress of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .console import Console

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.text import TokenizedText

_SECONDS_BETWEEN_LINES = 30


@contextmanager
def progress_bar(text: TokenizedText, console: Console, describe: Callable[[pd.DataFrame], str]) -> Iterator[Any]:
    """One bar: sequences, tokens a second, time left, and results so far in words. Elsewhere, a line now and then."""
    columns = (
        BarColumn(bar_width=24), TextColumn("{task.fields[done]}"), TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(),
        TextColumn("{task.fields[extremes]}"),
    )  # fmt: skip
    on = console.err.is_terminal and not console.err.quiet
    tokens = text.tokens / len(text.ids)
    begin: float | None = None
    started = spoke = time.monotonic()
    extremes = ""
    with Progress(*columns, console=console.err, disable=not on, transient=True, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=len(text.ids), done="", extremes="")

        def on_progress(now: Any) -> None:
            nonlocal begin, spoke, extremes
            begin = now.sequences if begin is None else begin  # those of an earlier start cost no time now
            seconds = max(1e-9, time.monotonic() - started)
            rate = (now.sequences - begin) * tokens / seconds
            extremes = describe(now.table()) if now.table is not None else extremes
            done = f"{now.sequences:.1f}/{now.total} sequences, {rate:,.3g} tokens/s"
            progress.update(task, completed=now.sequences, done=done, extremes=extremes)
            if not on and time.monotonic() - spoke > _SECONDS_BETWEEN_LINES:
                spoke = time.monotonic()
                left = f"{(now.total - now.sequences) * tokens / rate:,.0f} s left" if rate else ""
                console.log("; ".join(filter(None, [done, left, extremes])))

        yield on_progress


@contextmanager
def counter(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, from the first count to the last; call it with how many are done, and of how many."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn(f"{{task.completed}}/{{task.total}} {what}"),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console.err, transient=True)
    task = progress.add_task("", total=None)

    # On screen only while it counts: older versions of rich refuse two bars, or a bar and a spinner, at once.
    def count(done: int, of: int) -> None:
        if not console.err.is_terminal or console.err.quiet:
            return
        progress.update(task, completed=done, total=of)
        (progress.stop if done >= of else progress.start)()

    try:
        yield count
    finally:
        if progress.live.is_started:
            progress.stop()
