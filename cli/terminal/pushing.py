"""Push what a command has written to the Hub, and say so."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from layersurgery.errors import LayerSurgeryError
from layersurgery.units import format_bytes

from .console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from layersurgery.repositories.push import Pushed


def push_result(console: Console, value: Any, items: Sequence[RenderableType], written: Path) -> None:
    """Push a directory, and print a command's result with where it was pushed to.

    If the push fails, the result is printed without it before the error is raised.
    """
    from layersurgery.repositories.push import push_directory

    repo = str(console.push)
    try:
        console.log(f"Pushing {written} to {repo}")  # the Hub client shows its own progress bars
        with hub_bars(console):
            pushed = push_directory(written, repo, public=console.public, note=console.note)
    except BaseException as error:
        console.show(value, *items)
        later = shlex.join(["layersurgery", "push", str(written), repo, *(["--public"] if console.public else [])])
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{written} is complete; to push it, run: {later}") from None
        if isinstance(error, LayerSurgeryError):
            raise type(error)(f"{error}. {written} is complete; to push it later, run: {later}") from error
        raise
    console.show(value | {"pushed": pushed_value(pushed)}, *items, escape(pushed_line(pushed)))


@contextmanager
def hub_bars(console: Console) -> Iterator[None]:
    """Show the Hub client's progress bars while the `with` block runs, unless the console is quiet."""
    from huggingface_hub import utils

    if not console.err.quiet or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def pushed_value(pushed: Pushed) -> dict[str, Any]:
    """Return what was pushed in the form that --json prints."""
    names = ("repo", "kind", "private", "url", "commit", "files")
    return {name: getattr(pushed, name) for name in names}


def pushed_line(pushed: Pushed) -> str:
    """Say what was pushed, or would be."""
    count, size = len(pushed.files), format_bytes(sum(pushed.files.values()))
    verb = "Would push" if pushed.commit is None else "Pushed"
    visibility = "private" if pushed.private else "public"
    where = f"the {visibility} {pushed.kind} repository {pushed.url or pushed.repo}"
    return f"{verb} {count} file{'s'[: count != 1]} ({size}) to {where}"
