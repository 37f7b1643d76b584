"""Command line of the benchmarks: `python -m benchmarks COMMAND`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Benchmarks of layersurgery against its alternatives.", pretty_exceptions_enable=False
)


@app.callback()
def _main() -> None:
    pass


@app.command()
def checkpoint(
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A small checkpoint, to test the benchmark itself.")] = False,
    hub: Annotated[
        Path | None, typer.Option("--hub", help="Hub cache that holds, or will hold, the checkpoint.")
    ] = None,
    work: Annotated[Path | None, typer.Option("--work", help="Directory for outputs; needs 45 GB.")] = None,
    only: Annotated[
        str, typer.Option("--only", help="Methods to time besides cp -r, as names or parts of names: layersurgery.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time the swap of two layers of a checkpoint on disk."""
    from .checkpoint import measure

    with tempfile.TemporaryDirectory(prefix="layersurgery-benchmark-") as temporary:
        rows = measure(runs, hub, work or Path(temporary), only=only, quick=quick, as_json=as_json)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def operate(
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")
    ] = 21,
    width: Annotated[int, typer.Option("--width", min=8, help="Width of the 32-layer model.")] = 1024,
    quick: Annotated[bool, typer.Option("--quick", help="A small model, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time an edit of a loaded model and its undo."""
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
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Number of tokens.")] = 2044,
    width: Annotated[int, typer.Option("--width", min=1, help="Width of the residual stream.")] = 576,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=2, help="Size of the vocabulary.")] = 49152,
    dtypes: Annotated[
        str, typer.Option("--dtypes", help="Dtypes of streams and unembedding, comma-separated.")
    ] = "float32,bfloat16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")
    ] = 11,
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time the readout: from streams to lse, entropy, loss and argmax."""
    import torch

    from .readout import Shape, measure
    from .sweep import require_no_fault

    rows = []
    for dtype in dtypes.split(","):
        shape = Shape(64 if quick else tokens, width, vocabulary, getattr(torch, dtype), device)
        rows += measure(shape, 3 if quick else runs, as_json=as_json, name="readout-quick" if quick else "readout")
    if as_json:
        print(json.dumps(rows, indent=2))
    require_no_fault(rows)


@app.command()
def sweep(
    model: Annotated[
        str,
        typer.Option(
            "--model", help="smollm2-135m, a checkpoint's directory, or a geometry with random weights: pythia-1.4b."
        ),
    ] = "smollm2-135m",
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Number of sequences.")] = 4,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in one batch.")] = 4,
    dtypes: Annotated[
        str, typer.Option("--dtypes", help="Dtypes of layersurgery, the loop by hand and the limit.")
    ] = "float32,bfloat16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")] = 3,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also run TransformerLens, nnsight, nnterp and neuro-scan.")
    ] = True,
    only: Annotated[
        str, typer.Option("--only", help="Methods to run, as names or parts of names: limit,layersurgery,Trans.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Little text and one run, to test the benchmark itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time swap and drop of every block, with the metrics of each edit."""
    from .sweep import Setting, measure, require_no_fault

    setting = Setting(model, sequences, context, batch_size, device, runs)
    if quick:
        setting = Setting(model, 1, 64, 1, device, 1)
    chosen_dtypes = ["float32"] if quick else dtypes.split(",")
    rows = measure(
        setting, chosen_dtypes, peers=peers, only=only, as_json=as_json, name="sweep-quick" if quick else "sweep"
    )
    if as_json:
        print(json.dumps(rows, indent=2))
    require_no_fault(rows)


@app.command()
def gpu(
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            help="Parts, comma-separated: readout, small (Pythia-1.4b), large (Pythia-6.9b), offloaded, observe.",
        ),
    ] = "readout,small,large,offloaded,observe",
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, help="Time for all parts; what does not fit is left out and named.")
    ] = 60,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the rows; benchmarks/results if not given.")
    ] = None,
    only: Annotated[
        str,
        typer.Option("--only", help="Parts of names of readout variants, and of methods of small and large."),
    ] = "",
    dry: Annotated[
        bool, typer.Option("--dry", help="All of it on a CPU at tiny sizes, to test the benchmark itself.")
    ] = False,
) -> None:
    """Run all benchmarks that need a GPU, with random weights; needs nothing but the checkout."""
    from .gpu import PARTS, Settings, measure

    chosen_parts = parts.split(",")
    if unknown := set(chosen_parts) - set(PARTS):
        raise typer.BadParameter(
            f"unknown parts: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}", param_hint="'--parts'"
        )
    if failed := measure(chosen_parts, Settings(minutes=minutes, directory=output, only=only, dry=dry)):
        raise SystemExit(f"{failed[0]}{f' (and {len(failed) - 1} more)' if failed[1:] else ''}")


@app.command()
def offload(
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Number of sequences.")] = 2,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a sequence.")] = 256,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")] = 3,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time a sweep with all weights on disk, and the same sweep in memory."""
    from .sweep import Setting, list_offload_methods, measure, require_no_fault

    setting = Setting("smollm2-135m", sequences, context, sequences, device, runs)
    rows = measure(setting, ["float32"], methods=list_offload_methods(sequences), as_json=as_json, name="offload")
    if as_json:
        print(json.dumps(rows, indent=2))
    require_no_fault(rows)


@app.command()
def signals(
    context: Annotated[int, typer.Option("--context", min=8, help="Tokens in the sequence.")] = 2048,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Runs of each method that count; methods take turns.")] = 5,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Little text, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time the signals measured during a pass over text, and a plain forward."""
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
    layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of the checkpoint, at most 32.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time the analysis of the neurons of a checkpoint with Pythia-6.9b's geometry."""
    from .signals import neurons as measure

    rows = measure(layers, as_json=as_json)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def startup(
    model: Annotated[str, typer.Option("--model", help="The model to load.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of the first batch.")] = 512,
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Runs of each command that count; commands take turns.")
    ] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Little text and one run, to test the benchmark.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time a sweep until its first number, by phase, and commands that need no model."""
    from .startup import measure

    rows = measure(
        1 if quick else runs,
        model,
        min(tokens, 64) if quick else tokens,
        as_json=as_json,
        name="startup-quick" if quick else "startup",
    )
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command(name="paper-costs")
def paper_costs() -> None:
    """Estimate the time of the paper's protocol on GPUs, and print it as a table."""
    from .paper_costs import print_table

    print_table()


@app.command()
def stopping(
    directory: Annotated[Path, typer.Argument(help="A finished sweep of swap and drop that measured all of its text.")],
    until: Annotated[str, typer.Option("--until", help="Precision, as for sweep.")] = "agreement=1pt,kl=10%",
    lowest: Annotated[int, typer.Option("--lowest", min=1, help="Layers that a race searches.")] = 6,
    orders: Annotated[int, typer.Option("--orders", min=1, help="Random texts for coverage.")] = 1000,
    quick: Annotated[bool, typer.Option("--quick", help="Ten texts, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Simulate sweeps that stop when they are sure: coverage, block calls saved, and races."""
    from .stopping import measure

    name = "stopping-quick" if quick else "stopping"
    rows = measure(directory, until, lowest, 10 if quick else orders, as_json=as_json, name=name)
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command(name="second-order")
def second_order(
    model: Annotated[str, typer.Argument(help="Model name or path.")] = "smollm2-135m",
    tokens: Annotated[
        int, typer.Option("--tokens", min=4, help="Tokens to choose on, and tokens to measure on.")
    ] = 2048,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of a sequence.")] = 128,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Tokens drawn at each position.")] = 16,
    remove: Annotated[str, typer.Option("--remove", help="Numbers of layers, comma-separated.")] = "3,6,9",
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Choose layers to remove by a second-order estimate of the KL, and compare with the other criteria."""
    from .second_order import measure

    sizes = tuple(map(int, remove.split(",")))
    rows = (
        measure(model, 64, 16, 2, (1, 2), as_json=as_json, name="second-order-quick")
        if quick
        else measure(model, tokens, context, draws, sizes, as_json=as_json, name="second-order")
    )
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command()
def tasks(
    model: Annotated[str, typer.Option("--model", help="Model name or path.")] = "smollm2-135m",
    edits: Annotated[str, typer.Option("--edits", help="Families of edits.")] = "swap,drop",
    questions: Annotated[int, typer.Option("--questions", min=1, help="Questions of four choices.")] = 200,
    sentences: Annotated[int, typer.Option("--sentences", min=1, help="Sentences before each question.")] = 3,
    every: Annotated[
        int, typer.Option("--every", min=1, help="lm-eval evaluates each N-th edit; its time for all is estimated.")
    ] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests that lm-eval runs at once.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Few questions, to test the benchmark itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
) -> None:
    """Time a task on every edited model: one sweep, and lm-eval on one model after another."""
    from .tasks import measure

    rows = measure(
        model,
        edits,
        4 if quick else questions,
        sentences,
        10 if quick else every,
        batch_size,
        as_json=as_json,
        result="tasks-quick" if quick else "tasks",
    )
    if as_json:
        print(json.dumps(rows, indent=2))
    if fault := rows[0]["fault"]:
        raise SystemExit(f"other values than lm-eval's: {fault}")


@app.command()
def plot(
    model: Annotated[str, typer.Option("--model", help="Model of the sweep to plot.")] = "smollm2-135m",
) -> None:
    """Plot the newest results of a sweep: benchmarks/results/sweep.png."""
    from .plot_results import save_plot

    print(save_plot(model))


@app.command(name="all")
def run_all(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run each as briefly as possible, to test the benchmarks themselves.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also run other libraries, in separate environments.")
    ] = True,
) -> None:
    """Run checkpoint, operate, readout and sweep, one after another."""
    operate(21, 1024, quick, as_json=False)
    readout(2044, 576, 49152, "float32" if quick else "float32,bfloat16", "cpu", 11, quick, as_json=False)
    sweep("smollm2-135m", 4, 512, 4, "float32,bfloat16", "cpu", 3, peers, "", quick, as_json=False)
    checkpoint(1 if quick else 3, quick, None, None, as_json=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
