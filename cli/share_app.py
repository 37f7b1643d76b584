"""Define the commands that push to the Hub and fetch from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .expand import expand
from .terminal.console import Console

_SHARE = "Share"


@expand
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A checkpoint, or results.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; a new one is made.")],
    public: o.Public = False,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Message of the commit.", metavar="TEXT", show_default="the directory"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, without the network, and exit.")
    ] = False,
    *,
    console: Console,
) -> None:
    """Push a checkpoint to a model repository on the Hub, or results to a dataset repository.

    A new repository is private. In an existing one, the upload is one new commit, which deletes no files.
    """
    from .commands.share import run_push

    run_push(directory, repo, public, message, dry_run, console)


@expand
def fetch_results(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Dataset repository that results were pushed to.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write to.", show_default="./NAME", metavar="DIR"),
    ] = None,
    revision: o.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be downloaded, and exit.")] = False,
    *,
    console: Console,
) -> None:
    """Fetch results from the Hub; report, plot and read_results read them."""
    from .commands.share import run_fetch_results

    run_fetch_results(repo, output, revision, dry_run, console)


def add_sharing(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("push", rich_help_panel=_SHARE)(push)
    app.command("fetch-results", rich_help_panel=_SHARE)(fetch_results)
