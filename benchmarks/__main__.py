"""`python -m benchmarks COMMAND`: checkpoint, operate, readout, sweep, offload, signals, neurons, all of them, those of a GPU, costs, a picture."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Throughput against what a user would pick instead.", pretty_exceptions_enable=False
)


@app.callback()
def _main() -> None:
    pass


@app.command()
def checkpoint(
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small checkpoint, for trying the benchmark itself.")
    ] = False,
    hub: Annotated[
        Path | None, typer.Option("--hub", help="Hub cache that holds, or will hold, the checkpoint.")
    ] = None,
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
    quick: Annotated[bool, typer.Option("--quick", help="A small model, for trying the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Edit a live model and undo it."""
    from .operate import measure

    rows = (
        measure(3, width=256, as_json=as_json, name="operate-quick")
        if quick
        else measure(runs, width=width, as_json=as_json)
    )
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def readout(
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many are read.")] = 2044,
    width: Annotated[int, typer.Option("--width", min=1, help="Of a stream.")] = 576,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=2, help="How many logits.")] = 49152,
    dtypes: Annotated[str, typer.Option("--dtypes", help="Of streams and unembedding.")] = "float32,bfloat16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 11,
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens, for trying the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Turn streams into lse, entropy, loss and argmax."""
    import torch

    from .readout import Shape, measure

    rows = []
    for dtype in dtypes.split(","):
        shape = Shape(64 if quick else tokens, width, vocabulary, getattr(torch, dtype), device)
        rows += measure(shape, 3 if quick else runs, as_json=as_json, name="readout-quick" if quick else "readout")
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def sweep(
    model: Annotated[
        str, typer.Option("--model", help="smollm2-135m, a directory, or a geometry with random weights: pythia-1.4b.")
    ] = ("smollm2-135m"),
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="How many.")] = 4,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of each.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")] = 4,
    dtypes: Annotated[str, typer.Option("--dtypes", help="Of layersurgery and the loop by hand.")] = "float32,bfloat16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 3,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Run TransformerLens, nnsight and nnterp.")] = True,
    only: Annotated[
        str, typer.Option("--only", help="Ways of these names, or with these in them: limit,layersurgery,Trans.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Little text and one run, for trying the benchmark itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Swap and drop every block, and measure what it does."""
    from .sweep import Setting, measure

    setting = Setting(model, sequences, context, batch_size, device, runs)
    if quick:
        setting = Setting(model, 1, 64, 1, device, 1)
    chosen = ["float32"] if quick else dtypes.split(",")
    rows = measure(setting, chosen, peers=peers, only=only, as_json=as_json, name="sweep-quick" if quick else "sweep")
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def gpu(
    parts: Annotated[
        str, typer.Option("--parts", help="Of readout, small and large (Pythia-1.4b and 6.9b).")
    ] = "readout,small,large",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Measure what is to be known of a GPU, with random weights; needs nothing but the checkout."""
    from .gpu import PARTS, measure

    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: write some of {', '.join(PARTS)}", param_hint="'--parts'"
        )
    rows = measure(chosen, as_json=as_json)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def offload(
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="How many.")] = 2,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of each.")] = 256,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 3,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Sweep a model whose weights are on disk, beside the same in memory."""
    from .sweep import Setting, measure, ways_of_offloading

    setting = Setting("smollm2-135m", sequences, context, sequences, device, runs)
    rows = measure(setting, ["float32"], known=ways_of_offloading(sequences), as_json=as_json, name="offload")
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def signals(
    context: Annotated[int, typer.Option("--context", min=8, help="Tokens of the sequence.")] = 2048,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Counted runs of each way, in turn.")] = 5,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Little text, for trying the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Read signals off a pass over text, beside a plain forward."""
    from .signals import measure

    rows = measure(
        64 if quick else context,
        1 if quick else runs,
        device=device,
        as_json=as_json,
        name="signals-quick" if quick else "signals",
    )
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def neurons(
    layers: Annotated[int, typer.Option("--layers", min=1, help="Of the 32.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Look at the neurons of a checkpoint of Pythia-6.9b's geometry."""
    from .signals import neurons as measure

    rows = measure(layers, as_json=as_json)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def costs() -> None:
    """What the paper's protocol would take on GPUs, on paper."""
    from .paper_costs import measure

    measure()


@app.command()
def picture(model: Annotated[str, typer.Option("--model", help="Whose sweep.")] = "smollm2-135m") -> None:
    """Draw the newest results of a sweep: benchmarks/results/sweep.png."""
    from .plot_results import draw

    print(draw(model))


@app.command(name="all")
def everything(
    quick: Annotated[
        bool, typer.Option("--quick", help="Each as short as can be, for trying the benchmarks themselves.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Run other libraries, in environments of their own.")
    ] = True,
) -> None:
    """Run checkpoint, operate, readout and sweep, one after another."""
    operate(21, 1024, quick, as_json=False)
    readout(2044, 576, 49152, "float32" if quick else "float32,bfloat16", "cpu", 11, quick, as_json=False)
    sweep("smollm2-135m", 4, 512, 4, "float32,bfloat16", "cpu", 3, peers, "", quick, as_json=False)
    checkpoint(1 if quick else 3, quick, None, None, as_json=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
