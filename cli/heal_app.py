"""Define the commands that heal a model from which blocks were removed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .terminal.console import Console

_PRUNE = "Prune"


@o.expand
def heal_linear(
    model: o.Model,
    run: o.TextRun,
    checkpoint: o.Checkpoint,
    plan: Annotated[
        str, typer.Option("--plan", help="Edits that remove blocks, for example 'drop 20:24'.", metavar="TEXT")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write the healed checkpoint to.",
            show_default="./<name>-<plan>-healed",
            metavar="DIR",
        ),
    ] = None,
    *,
    console: Console,
) -> None:
    """Remove blocks, and fit a linear map into the block before each cut, without training.

    The map is folded into the output projection of that block's MLP, so the result is a plain checkpoint. The KL and
    the loss before and after are of text that the fit has not seen.
    """
    from layersurgery.plans.plan import Plan

    from .commands.heal import run_heal_linear

    run_heal_linear(model, Plan.parse(plan), run, output, **asdict(checkpoint), console=console)


def add_healing(app: typer.Typer) -> None:
    """Add the healing commands to the program."""
    app.command("heal-linear", rich_help_panel=_PRUNE)(heal_linear)
