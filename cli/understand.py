"""The commands `analyze` and `stages`."""

from __future__ import annotations

from collections.abc import Callable

import typer

from . import options as o
from . import sweep_options as s
from .talk import Talk

_PANEL = "Understand"
analyze = typer.Typer(
    no_args_is_help=True, help="Read one signal off a model: what its layers do. Tables, figures, and how it was run."
)


def _of_text(word: str, doc: str) -> Callable[..., None]:
    """A command that measures an analysis on text."""

    def command(
        model: o.Model,
        data: s.Data = None,
        split: s.Split = "train",
        column: s.Column = "text",
        tokens: s.Tokens = None,
        context: s.Context = None,
        pack: s.Pack = True,
        bos: s.Bos = False,
        shuffle: s.Shuffle = None,
        seed: s.Seed = 0,
        tokenizer: s.Tokenizer = None,
        batch_size: s.BatchSize = None,
        dtype: s.Dtype = "auto",
        device: s.Device = None,
        device_map: s.DeviceMap = None,
        max_memory: s.MaxMemory = None,
        offload_folder: s.OffloadFolder = None,
        revision: o.Revision = None,
        blocks: o.Blocks = None,
        output: s.AnalysisOutput = None,
        overwrite: s.Overwrite = False,
        quiet: o.Quiet = False,
        as_json: o.Json = False,
    ) -> None:
        from .analyze import run_analysis
        from .sweep import Options

        given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
        run_analysis(word, model, Options.of(**given), Talk(quiet=quiet, as_json=as_json))

    command.__doc__ = doc
    return command


@analyze.command("neurons")
def neurons(
    model: o.Model,
    dtype: s.Dtype = "auto",
    device: s.Device = None,
    device_map: s.DeviceMap = None,
    max_memory: s.MaxMemory = None,
    offload_folder: s.OffloadFolder = None,
    revision: o.Revision = None,
    blocks: o.Blocks = None,
    output: s.AnalysisOutput = None,
    overwrite: s.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Prediction and suppression neurons, from the weights alone; on a CPU, a block at a time."""
    from .analyze import run_neurons
    from .sweep import Options

    given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    run_neurons(model, Options.of(**given), Talk(quiet=quiet, as_json=as_json))


def add_analyses(app: typer.Typer) -> None:
    """Add them to a program."""
    app.add_typer(analyze, name="analyze", rich_help_panel=_PANEL)
    analyze.command("attention")(_of_text("attention", "How much attention goes to the five tokens before."))
    analyze.command("norms")(_of_text("norms", "The size of what attention and MLP add to the stream."))
    analyze.command("lens")(_of_text("lens", "What the model would say behind each block (the logit lens)."))
    analyze.command("similarity")(_of_text("similarity", "What blocks add when they are swapped, and when not: cosines."))
    app.command("stages", rich_help_panel=_PANEL)(
        _of_text(
            "stages",
            "All signals of a model side by side over its depth, and the four stages that they show. Stopped, it goes on where it was.",
        )
    )
