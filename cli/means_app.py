"""Define the command that measures means of branches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import option_groups as g
from . import options as o
from .expand import expand
from .terminal.console import DryRunConsole

_MEASURE = "Measure"


@expand
def means(
    model: o.Model,
    run: g.FitRun,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write the means to.",
            show_default="./<name>-means.safetensors",
            metavar="FILE",
        ),
    ] = None,
    first_tokens: Annotated[
        bool,
        typer.Option(
            "--first-tokens", help="Also count the first token of each sequence, whose stream is often much longer."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file at the output.")] = False,
    *,
    console: DryRunConsole,
) -> None:
    """Measure the mean over tokens of what each attention and MLP adds, for edits such as 'skip-mlp 20 mean'."""
    from .commands.means import run_means

    run_means(model, run, output, console, first_tokens=first_tokens, overwrite=overwrite)


def add_means(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("means", rich_help_panel=_MEASURE)(means)
