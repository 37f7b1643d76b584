"""Define the commands that heal a model from which blocks were removed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import completion
from . import option_groups as g
from . import options as o
from .expand import expand
from .terminal.console import MeasuringConsole

_PRUNE = "Prune"
_TRAINING = "Training"


@expand
def heal_linear(
    model: o.Model,
    run: g.FitRun,
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
    checkpoint: g.Checkpoint,
    console: MeasuringConsole,
) -> None:
    """Remove blocks, and fit a linear map into the block before each cut, without training.

    The map is folded into the output projection of that block's MLP, so the result is a plain checkpoint. The KL and
    the loss before and after are of text that the fit has not seen.
    """
    from layersurgery.plans.plan import Plan

    from .commands.heal import run_heal_linear

    run_heal_linear(model, Plan.parse(plan), run, output, **asdict(checkpoint), console=console)


def _shown(name: str, help_text: str, metavar: str = "N", **more: Any) -> Any:
    return typer.Option(name, help=help_text, metavar=metavar, rich_help_panel=_TRAINING, **more)


@expand
def heal(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The edited model: anything that MODEL may be.",
            autocompletion=completion.models,
        ),
    ],
    teacher: Annotated[
        str, _shown("--teacher", "The unedited model. It must have the same vocabulary.", "MODEL", show_default=False)
    ],
    steps: Annotated[int, _shown("--steps", "Steps of the optimizer.", min=1, show_default=False)],
    run: g.HealRun,
    how: Annotated[
        str,
        _shown(
            "--how",
            "What is trained: lora (matrices that are added to the blocks' linear layers, and merged at the end; needs "
            "pip install 'layersurgery\\[heal]') or full (all weights).",
            "lora|full",
        ),
    ] = "lora",
    rank: Annotated[int, _shown("--rank", "Rank of LoRA's matrices.", min=1)] = 16,
    lr: Annotated[
        float | None,
        _shown("--lr", "Largest learning rate.", "RATE", show_default="5e-4 for lora, 5e-5 for full"),
    ] = None,
    warmup: Annotated[
        float,
        _shown("--warmup", "Share of the steps in which the learning rate rises; then it falls as a cosine.", "P"),
    ] = 0.1,
    loss_weight: Annotated[
        float, _shown("--loss-weight", "Weight of the loss on the true tokens, from 0 to 1; KL has the rest.", "P")
    ] = 0.0,
    accumulate: Annotated[
        int, _shown("--accumulate", "Run the sequences of a step in so many parts, to save memory.", min=1)
    ] = 1,
    mixed_precision: Annotated[
        str | None,
        _shown(
            "--mixed-precision", "Data type to compute in.", "no|bf16|fp16", show_default="accelerate's own setting"
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        _shown(
            "--evaluate-every",
            "Steps between two evaluations on the held-out text.",
            min=1,
            show_default="a fifth of the steps",
        ),
    ] = None,
    save_every: Annotated[int, _shown("--save-every", "Steps between two saved states.", min=1)] = 25,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write the healed checkpoint to.",
            show_default="./<name>-healed",
            metavar="DIR",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, and the state of a training with other options.")
    ] = False,
    *,
    console: MeasuringConsole,
) -> None:
    """Train an edited checkpoint to predict like the unedited model.

    What is minimized is the KL of the predictions. The last twentieth of the text is held out and measured before,
    during and after the training. Interrupted, the same command resumes. Started by accelerate launch or torchrun,
    several processes share the sequences of each step.
    """
    from layersurgery.analyses.heal_training import TrainingOptions

    from .commands.heal import run_heal

    training = TrainingOptions(
        steps, how, rank, lr, warmup, loss_weight, accumulate, mixed_precision, evaluate_every, save_every
    )
    run_heal(checkpoint, teacher, run, training, output, overwrite, console)


def add_healing(app: typer.Typer) -> None:
    """Add the healing commands to the program."""
    app.command("heal", rich_help_panel=_PRUNE)(heal)
    app.command("heal-linear", rich_help_panel=_PRUNE)(heal_linear)
