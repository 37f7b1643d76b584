"""Push what a command has written to the Hub, and say so."""

from __future__ import annotations

from collections.abc import Sequence
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
        with console.status(f"Pushing {written} to {repo}"):
            pushed = push_directory(written, repo, public=console.public, note=console.note)
    except BaseException as error:
        console.show(value, *items)
        later = f"layersurgery push {written} {repo}{' --public' * console.public}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{written} is complete; to push it, run: {later}") from None
        if isinstance(error, LayerSurgeryError):
            raise type(error)(f"{error}. {written} is complete; to push it later, run: {later}") from error
        raise
    console.show(value | {"pushed": pushed_value(pushed)}, *items, escape(pushed_line(pushed)))


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
