"""`python -m benchmarks checkpoint`, `python -m benchmarks operate`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Throughput against what a user would pick instead.", pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    pass


@app.command()
def checkpoint(
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A small checkpoint, for trying the benchmark itself.")] = False,
    hub: Annotated[Path | None, typer.Option("--hub", help="Hub cache that holds, or will hold, the checkpoint.")] = None,
    work: Annotated[Path | None, typer.Option("--work", help="Where to write; needs 45 GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Swap two layers of a checkpoint on disk."""
    from .checkpoint import measure

    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as made:
        rows = measure(runs, hub, work or Path(made), quick=quick, as_json=as_json)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def operate(
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 21,
    width: Annotated[int, typer.Option("--width", min=8, help="Width of the model of 32 layers.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Edit a live model and undo it."""
    from .operate import measure

    rows = measure(runs, width=width)
    if as_json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
