"""The commands `analyze` and `stages`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .terminal.console import Console

_PANEL = "Understand"
analyze = typer.Typer(
    no_args_is_help=True, help="Read one signal off a model: what its layers do. Tables, figures, and how it was run."
)


def _of_text(word: str, doc: str) -> Callable[..., None]:
    """A command that measures an analysis on text."""

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

        given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
        run_analysis(word, model, MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json))

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
    """Prediction and suppression neurons, from the weights alone; on a CPU, a block at a time."""
    from .commands.analyze import run_neurons
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_neurons(model, MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json))


@analyze.command("subjoiners")
def subjoiners(
    model: o.Model,
    samples: Annotated[
        int, typer.Option("--samples", min=8, help="Windows of each class, at most.", metavar="N")
    ] = 200,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: Annotated[
        str, typer.Option("--tokens", "-n", help="How many to look through for words, at most.", metavar="N")
    ] = "1M",
    bos: Annotated[bool, typer.Option("--bos", help="Put the beginning-of-text token before every window.")] = False,
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
    """Heads by which the last token of a four-token word looks at the others: ranked, with effect sizes, and shown on words."""
    from .commands.subjoiners import run_subjoiners
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_subjoiners(model, samples, MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json))


@analyze.command("probe")
def probe(
    model: o.Model,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            help="The next token ends with it, white space and capitals aside.",
            show_default="ing",
            metavar="TEXT",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            "--regex",
            help="Or a regular expression is found in the next token, as in '^ [A-Z]'.",
            show_default=False,
            metavar="RE",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=32, help="Windows of each class, at most: half to train on.", metavar="N")
    ] = 1000,
    data: o.Data = None,
    split: o.Split = "train",
    column: o.Column = "text",
    tokens: Annotated[
        str, typer.Option("--tokens", "-n", help="How many to look through for windows, at most.", metavar="N")
    ] = "1M",
    bos: Annotated[bool, typer.Option("--bos", help="Put the beginning-of-text token before every window.")] = False,
    shuffle: o.Shuffle = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.", metavar="N")] = 0,
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
    """Linear probes on prediction and suppression neurons: will the next token end with -ing? One neuron, several, and the model itself."""
    from .commands.probe import ProbeOptions, run_probe
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_probe(
        model, ProbeOptions(suffix, regex, samples), MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json)
    )


_PRUNE = "Prune"


def rank(
    model: o.Model,
    spans: Annotated[
        int | None,
        typer.Option(
            "--spans",
            min=1,
            help="Angular distances over up to so many blocks.",
            show_default="half of the model's",
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
    """Order layers by what their removal costs: measured, beside block influence and angular distance."""
    from .commands.prune import run_rank
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_rank(model, spans, MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json))


def prune(
    model: o.Model,
    remove: Annotated[int, typer.Option("--remove", min=1, help="How many layers.", show_default=False)],
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="kl: whose removal changes predictions least; influence: least block influence (ShortGPT); angular: the span over which the "
            "stream turns least (Gromov et al.).",
            metavar="WAY",
        ),
    ] = "kl",
    greedy: Annotated[bool, typer.Option("--greedy", help="Measure what is left anew after each removal.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Checkpoint to write.", show_default="./<name>-prune-<remove>-<by>", metavar="DIR"
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", help="Directory of what is measured.", show_default="./<output>-results", metavar="DIR"
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
        bool, typer.Option("--overwrite", help="Replace the output, and what was measured with other arguments.")
    ] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Write a checkpoint without the layers that are missed least, and say what that costs. Stopped, it goes on where it was."""
    from .commands.prune import PruneOptions, run_prune
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_prune(
        model,
        PruneOptions(remove, by, greedy, results, link, verify),
        MeasureOptions.of(**given),
        Console(quiet=quiet, as_json=as_json),
    )


def reproduce(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            help="Whose; several separated by commas, or given several times.",
            show_default="the paper's eleven",
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
        bool, typer.Option("--estimate", help="Say what is left to do and what it costs, and stop.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory of a directory for each model, of figures and of the report.",
            metavar="DIR",
        ),
    ] = Path("reproduction"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure anew what is there already.")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """All experiments of the paper on one model after another, and a report. Stopped, it goes on where it was."""
    from .commands.reproduce import PAPER, run_reproduce
    from .session.run_options import MeasureOptions

    given = {name: value for name, value in locals().items() if name in MeasureOptions.__dataclass_fields__}
    run_reproduce(models or PAPER, output, MeasureOptions.of(**given), Console(quiet=quiet, as_json=as_json))


def add_analyses(app: typer.Typer) -> None:
    """Add them to a program."""
    app.add_typer(analyze, name="analyze", rich_help_panel=_PANEL)
    analyze.command("attention")(_of_text("attention", "How much attention goes to the five tokens before."))
    analyze.command("norms")(_of_text("norms", "The size of what attention and MLP add to the stream."))
    analyze.command("lens")(_of_text("lens", "What the model would say behind each block (the logit lens)."))
    analyze.command("similarity")(
        _of_text("similarity", "What blocks add when they are swapped, and when not: cosines.")
    )
    app.command("stages", rich_help_panel=_PANEL)(
        _of_text(
            "stages",
            "All signals of a model side by side over its depth, and the four stages that they show. Stopped, it goes on where it was.",
        )
    )
    app.command("reproduce", rich_help_panel=_PANEL)(reproduce)
    app.command("rank", rich_help_panel=_PRUNE)(rank)
    app.command("prune", rich_help_panel=_PRUNE)(prune)
