"""Define the commands `analyze`, `stages`, `rank`, `prune` and `reproduce`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .terminal.console import Console

_ANALYZE = "Analyze"
_PRUNE = "Prune"
analyze = typer.Typer(
    no_args_is_help=True,
    help="Measure one signal of every layer of a model; write tables, figures and a record of the run.",
)


def _text_command(word: str, doc: str) -> Callable[..., None]:
    """Make a command that runs an analysis on text."""

    def command(
        model: o.Model,
        data: o.Data = None,
        split: o.Split = "train",
        column: o.Column = "text",
        tokens: o.Tokens = None,
        context: o.Context = None,
        pack: o.Pack = True,
        bos: o.Bos = False,
        shuffle: o.Shuffle = None,
        seed: o.Seed = 0,
        tokenizer: o.Tokenizer = None,
        batch_size: o.BatchSize = None,
        dtype: o.Dtype = "auto",
        device: o.Device = None,
        device_map: o.DeviceMap = None,
        max_memory: o.MaxMemory = None,
        offload_folder: o.OffloadFolder = None,
        revision: o.Revision = None,
        blocks: o.Blocks = None,
        output: o.AnalysisOutput = None,
        overwrite: o.OverwriteResults = False,
        quiet: o.Quiet = False,
        as_json: o.Json = False,
    ) -> None:
        from .commands.analyze import run_analysis
        from .session.run_options import MeasureOptions

        values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
        run_analysis(word, model, MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json))

    command.__doc__ = doc
    return command


@analyze.command("neurons")
def neurons(
    model: o.Model,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Find prediction and suppression neurons from the weights alone (on a CPU, one block at a time)."""
    from .commands.analyze import run_neurons
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_neurons(model, MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json))


@analyze.command("subjoiners")
def subjoiners(
    model: o.Model,
    samples: Annotated[
        int, typer.Option("--samples", min=8, help="Maximum number of windows per class.", metavar="N")
    ] = 200,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: Annotated[
        str, typer.Option("--tokens", "-n", help="Maximum number of tokens to search for words.", metavar="N")
    ] = "1M",
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the beginning-of-text token.")] = False,
    shuffle: o.Shuffle = None,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    revision: o.Revision = None,
    blocks: o.BlockList = None,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Rank attention heads by how much the last token of a four-token word attends to the word's other tokens."""
    from .commands.subjoiners import run_subjoiners
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_subjoiners(model, samples, MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json))


@analyze.command("probe")
def probe(
    model: o.Model,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            help="Class: next tokens that end with this text, ignoring white space and case.",
            show_default="ing",
            metavar="TEXT",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex",
            help="Class: next tokens that match this regular expression, for example '^ [A-Z]'; instead of --suffix.",
            show_default=False,
            metavar="RE",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=32, help="Maximum number of windows per class; half of them are for training.", metavar="N"
        ),
    ] = 1000,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: Annotated[
        str, typer.Option("--tokens", "-n", help="Maximum number of tokens to search for windows.", metavar="N")
    ] = "1M",
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the beginning-of-text token.")] = False,
    shuffle: o.Shuffle = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.", metavar="N")] = 0,
    tokenizer: o.Tokenizer = None,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    revision: o.Revision = None,
    blocks: o.BlockList = None,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Predict a class of next tokens (such as -ing) with linear probes on prediction and suppression neurons.

    Probes of one neuron and of several are compared with the model itself.
    """
    from .commands.probe import ProbeOptions, run_probe
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_probe(
        model, ProbeOptions(suffix, regex, samples), MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json)
    )


def rank(
    model: o.Model,
    spans: Annotated[
        int | None,
        typer.Option(
            "--spans",
            min=1,
            help="Longest span, in blocks, for angular distances.",
            show_default="half of the model's blocks",
            metavar="N",
        ),
    ] = None,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: o.Tokens = None,
    context: o.Context = None,
    pack: o.Pack = True,
    bos: o.Bos = False,
    shuffle: o.Shuffle = None,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    revision: o.Revision = None,
    blocks: o.BlockList = None,
    output: o.AnalysisOutput = None,
    overwrite: o.OverwriteResults = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Rank layers by the measured cost of removing them, and by block influence and angular distance."""
    from .commands.prune import run_rank
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_rank(model, spans, MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json))


def prune(
    model: o.Model,
    remove: Annotated[int, typer.Option("--remove", min=1, help="Number of layers to remove.", show_default=False)],
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="Criterion: kl removes the layers whose removal changes predictions least; influence removes those "
            "with the lowest block influence (ShortGPT); angular removes the span with the smallest angular "
            "distance (Gromov et al.).",
            metavar="CRITERION",
        ),
    ] = "kl",
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Measure the remaining layers again after each removal.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write the pruned checkpoint to.",
            show_default="./<name>-prune-<remove>-<by>",
            metavar="DIR",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Directory to write the measurements to.",
            show_default="./<output>-results",
            metavar="DIR",
        ),
    ] = None,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: o.Tokens = None,
    context: o.Context = None,
    pack: o.Pack = True,
    bos: o.Bos = False,
    shuffle: o.Shuffle = None,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    link: o.Link = False,
    verify: o.Verify = True,
    revision: o.Revision = None,
    blocks: o.BlockList = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, and measurements made with other arguments.")
    ] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Remove the least important layers, write the pruned checkpoint and report the cost.

    Interrupted runs resume when you run the same command again.
    """
    from .commands.prune import PruneOptions, run_prune
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_prune(
        model,
        PruneOptions(remove, by, greedy, results, link, verify),
        MeasureOptions.of(**values),
        Console(quiet=quiet, as_json=as_json),
    )


def reproduce(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            help="Models, comma-separated; may be repeated.",
            show_default="the eleven models of the paper",
            metavar="NAMES",
        ),
    ] = None,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: o.Tokens = None,
    context: o.Context = None,
    pack: o.Pack = True,
    bos: o.Bos = False,
    shuffle: o.Shuffle = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = None,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    offload_folder: o.OffloadFolder = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the remaining runs and their cost, and exit.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory to write to: one subdirectory per model, the figures and the report.",
            metavar="DIR",
        ),
    ] = Path("reproduction"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard existing results and measure again.")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Run all experiments of the paper on each model, and write a report.

    Interrupted runs resume when you run the same command again.
    """
    from .commands.reproduce import PAPER, run_reproduce
    from .session.run_options import MeasureOptions

    values = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_reproduce(models or PAPER, output, MeasureOptions.of(**values), Console(quiet=quiet, as_json=as_json))


def add_analyses(app: typer.Typer) -> None:
    """Add the analysis and pruning commands to the program."""
    app.add_typer(analyze, name="analyze", rich_help_panel=_ANALYZE)
    analyze.command("attention")(
        _text_command("attention", "Measure how much attention goes to the five previous tokens.")
    )
    analyze.command("norms")(
        _text_command("norms", "Measure the norms of what attention and MLP add to the residual stream.")
    )
    analyze.command("lens")(_text_command("lens", "Decode the residual stream after each block (the logit lens)."))
    analyze.command("similarity")(
        _text_command("similarity", "Compare what blocks add when swapped and when not (cosine similarity).")
    )
    app.command("stages", rich_help_panel=_ANALYZE)(
        _text_command(
            "stages",
            "Measure all signals over a model's depth and find the four stages of inference.\n\n"
            "Interrupted runs resume when you run the same command again.",
        )
    )
    app.command("reproduce", rich_help_panel=_ANALYZE)(reproduce)
    app.command("rank", rich_help_panel=_PRUNE)(rank)
    app.command("prune", rich_help_panel=_PRUNE)(prune)
